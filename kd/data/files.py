"""Readers of raw rows from files and hub data sets.

Every row comes with its place, the file and line to look at. A row that cannot be read is a BadRow.
Rows stay on disk until they are read, except those of CSV and text files and of JSON lists.
"""

import bisect
import csv
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".tar", ".7z", ".rar")
LARGEST_ROW = 16 * 2**20  # bytes; a line beyond it points to a broken file
BINARY = {
    b"\x1f\x8b": "gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it first",
    b"PK\x03\x04": "zip; unpack it first",
    b"PAR1": "Parquet; name it .parquet",
    b"ARROW1": "Arrow; name it .arrow",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<!DOCTYPE html": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}
TABLES = {".parquet": b"PAR1", ".arrow": b"ARROW1"}
BLANK = re.compile(r"[ \t\r\n]*")
TABLE_BATCH = 256  # rows of a table that are decoded together


class BadRow(ValueError):
    """A row that cannot be trained on. Dropped rows are counted by `kind`."""

    def __init__(self, place: str, kind: str, message: str) -> None:
        super().__init__(place, kind, message)  # unformatted, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        place, _, message = self.args
        return f"{place}: {message}"


class Reader(Protocol):
    """A sequence of raw rows."""

    def __len__(self) -> int: ...

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        """Yield (place, row) for each index."""
        ...


class JsonLines:
    """Reads a file with one JSON object per line; blank lines do not count."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.starts, self.numbers = array("Q"), array("Q")
        with open(path, "rb") as file:
            position = 0
            for number, line in enumerate(file, 1):
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    self.starts.append(position)
                    self.numbers.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        """Yield (place, row) for each index."""
        with open(self.path, "rb") as file:
            for i in indices:
                file.seek(self.starts[i])
                line = file.readline(LARGEST_ROW + 1).rstrip(b"\r\n")
                place = f"{self.path}, line {self.numbers[i]}"
                yield place, _result(json_object, line, place)


def json_object(line: bytes, place: str) -> dict:
    """Parse one line of JSON. Raises BadRow if it is not one JSON object."""
    if len(line) > LARGEST_ROW:
        found = f"the row is larger than {LARGEST_ROW >> 20} MiB; wanted one JSON object per line"
        raise BadRow(place, "too large", found)
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"not UTF-8 at byte {error.start}"
        raise BadRow(place, "not UTF-8", found) from error
    try:
        row = STRICT_JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(place, "not JSON", f"not JSON: {error}") from error
    return as_object(row, place)


def as_object(row: Any, place: str) -> dict:
    """Return a parsed row. Raises BadRow if it is not an object."""
    if not isinstance(row, dict):
        hint = " (a file that is one JSON list is named .json)" if isinstance(row, list) else ""
        found = f"found {type(row).__name__}; wanted a JSON object{hint}"
        raise BadRow(place, "not an object", found)
    return row


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Make an object of key-value pairs. Raises ValueError for a repeated key.

    Python's parser silently keeps the last of two equal keys.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} occurs twice in one object")
    return row


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_reject_constant)


class RowList:
    """Rows in memory, each with the line on which it begins."""

    def __init__(self, path: str, items: list[tuple[int, Any]]) -> None:
        self.path, self.items = path, items

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        """Yield (place, row) for each index."""
        for i in indices:
            line, row = self.items[i]
            place = f"{self.path}, line {line}"
            yield place, row if isinstance(row, BadRow) else _result(as_object, row, place)


def _result(read: Callable[[Any, str], dict], raw: Any, place: str) -> dict | BadRow:
    """Return what `read` returns, or the BadRow that it raises."""
    try:
        return read(raw, place)
    except BadRow as error:
        return error


def json_list(path: str) -> RowList:
    """Read a file that is one JSON list. Raises ValueError if it is not valid JSON.

    A syntax error fails the whole file, because the next row cannot be found after it.
    """
    text = read_text(path)
    items, line, counted = [], 1, 0
    position = next_character(text, text.index("[") + 1)
    closed = text.startswith("]", position)
    try:
        while not closed:
            line += text.count("\n", counted, position)
            counted = position
            row, position = STRICT_JSON.raw_decode(text, position)
            items.append((line, row))
            position = next_character(text, position)
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position += 0 if closed else 1
            position = next_character(text, position)
    except (ValueError, RecursionError) as error:
        where = line + text.count("\n", counted, getattr(error, "pos", counted))
        raise ValueError(f"{path}, line {where}: not JSON: {error}") from error
    rest = next_character(text, position + 1)
    if rest < len(text):
        found = "a second list" if text[rest] == "[" else repr(text[rest : rest + 40])
        raise ValueError(
            f"{path}, line {text.count(chr(10), 0, rest) + 1}: {found} follows the list; wanted "
            "one list, or one JSON object per line in a file named .jsonl"
        )
    return RowList(path, items)


def next_character(text: str, position: int) -> int:
    """Return the position of the next character that JSON reads, which may be the end."""
    return BLANK.match(text, position).end()


def check_one_row_per_line(path: str, head: bytes) -> None:
    """Raise ValueError if a file is one JSON value on several lines, not one object per line."""
    first = head.splitlines()[0].strip()
    if first not in (b"{", b"["):
        return
    wanted = "wanted one JSON object per line, or one list of objects in a file named .json"
    raise ValueError(f"{path}, line 1: only {first.decode()!r} on the line; {wanted}")


def csv_rows(path: str) -> RowList:
    """Read a CSV or TSV file, whose first line names the columns.

    Raises ValueError if a column has no name or two columns share one.
    """
    csv.field_size_limit(LARGEST_ROW)
    items: list[tuple[int, Any]] = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(
            file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True
        )
        header: list[str] | None = None
        while True:
            line = lines.line_num + 1
            try:
                cells = next(lines, None)
            except csv.Error as error:
                items.append((line, BadRow(f"{path}, line {line}", "not CSV", f"not CSV: {error}")))
                continue
            if cells is None:
                return RowList(path, items)
            if header is None:
                header = cells
                if len(set(header)) < len(header) or "" in header:
                    raise ValueError(
                        f"{path}, line 1: columns {header}; wanted a unique name for each"
                    )
            elif cells and len(cells) != len(header):
                found = f"{len(cells)} cells; wanted {len(header)}, as in the header"
                items.append((line, BadRow(f"{path}, line {line}", "not CSV", found)))
            elif cells:
                items.append((line, dict(zip(header, cells, strict=True))))


def text_rows(path: str, sample_by: str) -> RowList:
    """Read a text file; a row is a line, a paragraph (up to a blank line) or the whole document.

    Bytes that are not UTF-8 are kept as surrogates, so that each bad row is reported by itself.
    """
    text = read_text(path, errors="surrogateescape").replace("\r\n", "\n")
    end = {"line": "\n", "paragraph": "\n\n", "document": None}[sample_by]
    items, line = [], 1
    for part in text.split(end) if end else [text]:
        if part.strip():
            blank = len(part) - len(part.lstrip("\n"))
            items.append((line + blank, {"text": part.strip("\n")}))
        line += part.count("\n") + len(end or "")
    return RowList(path, items)


def read_text(path: str, errors: str = "strict") -> str:
    """Read a text file. If `errors` is strict, raises ValueError for text that is not UTF-8."""
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 at byte {error.start}") from error


class Table:
    """Reads a `datasets.Dataset`: a hub data set, or a Parquet or Arrow file."""

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, table

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        """Yield (place, row) for each index."""
        indices = list(indices)
        for start in range(0, len(indices), TABLE_BATCH):
            batch = indices[start : start + TABLE_BATCH]
            columns = self.table[batch]  # reading rows one by one takes ten times as long
            for j, i in enumerate(batch):
                yield f"{self.name} row {i}", {key: values[j] for key, values in columns.items()}


class Concatenation:
    """Reads several readers one after the other: the files of a folder or a pattern."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers
        self.ends = list(itertools.accumulate(map(len, readers)))

    def __len__(self) -> int:
        return self.ends[-1]

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        """Yield (place, row) for each index."""
        # Consecutive rows of one file are read together, so that the file is opened once.
        for which, group in itertools.groupby(indices, partial(bisect.bisect_right, self.ends)):
            start = self.ends[which - 1] if which else 0
            yield from self.readers[which].rows([i - start for i in group])


class FilteredRows:
    """Reads the rows whose columns have the given values. Bad rows are kept, to be reported."""

    def __init__(self, reader: Reader, values: dict) -> None:
        self.reader = reader
        rows = enumerate(raw for _, raw in reader.rows(range(len(reader))))
        self.indices = [
            i
            for i, raw in rows
            if isinstance(raw, BadRow) or all(raw.get(key) == values[key] for key in values)
        ]

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        """Yield (place, row) for each index."""
        return self.reader.rows(self.indices[i] for i in indices)


def file_kind(path: str) -> str:
    """Return the ending of a file name in lower case, such as .jsonl."""
    return Path(path).suffix.lower()


def read_file(path: str, sample_by: str = "line") -> Reader:
    """Open one local file. Raises ValueError if it has no rows or is not in the expected format."""
    with open(path, "rb") as file:
        head = file.read(4096)
    ending = file_kind(path)
    if not head:
        raise ValueError(f"{path}: the file is empty; wanted at least one row")
    for magic, what in BINARY.items():
        if head.startswith(magic) and magic != TABLES.get(ending):
            raise ValueError(f"{path}: the file is {what}")
    if ending in TABLES:
        return read_table(path, ending[1:])
    if b"\0" in head[:2]:
        raise ValueError(f"{path}: the file is binary or UTF-16; save it as UTF-8")
    if ending in (".csv", ".tsv"):
        reader: Reader = csv_rows(path)
    elif ending == ".txt":
        reader = text_rows(path, sample_by)
    elif ending == ".json" and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        reader = json_list(path)
    else:
        check_one_row_per_line(path, head.lstrip(b"\xef\xbb\xbf \t\r\n") or b"\n")
        reader = JsonLines(path)
    if not len(reader):
        raise ValueError(f"{path}: no rows; wanted at least one")
    return reader


def read_table(path: str, kind: str) -> Table:
    """Open a Parquet or Arrow file. Raises ValueError if it cannot be read or has no rows."""
    from datasets import load_dataset  # takes seconds to import; other files do not need it
    from datasets.exceptions import DatasetsError
    from pyarrow.parquet import read_metadata

    try:
        if kind == "parquet" and not read_metadata(path).num_rows:  # load_dataset fails otherwise
            raise ValueError("it has no rows; wanted at least one")
        table = load_dataset(kind, data_files=path, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path}: cannot be read as {kind}: {reason}") from error
    if not len(table):
        raise ValueError(f"{path}: no rows; wanted at least one")
    return Table(f"{path},", table)
