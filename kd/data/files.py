"""Raw rows of files and hub data sets, each with its place: the file and the line to look at.

A reader has a length, and `rows(indices)` gives (place, row) for each, where a row that cannot be
read is a BadRow. Rows stay on the disk until they are asked for, but for CSV and lists of JSON.
"""

import bisect
import csv
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
LARGEST_ROW = 16 * 2**20  # bytes; a million words are no training row, but a broken file
BINARY = {
    b"\x1f\x8b": "gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it first",
    b"PK\x03\x04": "zip; unpack it first",
    b"PAR1": "Parquet; name it .parquet",
    b"ARROW1": "Arrow; name it .arrow",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
BLOCK = 256  # rows of a table that are decoded together


class BadRow(ValueError):
    """A row that cannot be trained on. `kind` is what the counts of dropped rows are kept by."""

    def __init__(self, place: str, kind: str, message: str) -> None:
        super().__init__(place, kind, message)  # as they are, so that it can be pickled
        self.kind = kind

    def __str__(self) -> str:
        place, _, message = self.args
        return f"{place}: {message}"


class Reader(Protocol):
    def __len__(self) -> int: ...
    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]: ...


class JsonLines:
    """One JSON object a line; blank lines do not count."""

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
        with open(self.path, "rb") as file:
            for i in indices:
                file.seek(self.starts[i])
                line = file.readline(LARGEST_ROW + 1).rstrip(b"\r\n")
                place = f"{self.path}, line {self.numbers[i]}"
                yield place, caught(json_object, line, place)


def json_object(line: bytes, place: str) -> dict:
    if len(line) > LARGEST_ROW:
        raise BadRow(place, "too large", f"a row of more than {LARGEST_ROW >> 20} MiB")
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
    if not isinstance(row, dict):
        raise BadRow(place, "no object", f"found {type(row).__name__}; wanted {{}}")
    return row


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Python keeps the last of two equal keys in silence; this hook refuses them."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {double!r} twice in one object")
    return row


def no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=no_number)


class Listed:
    """Rows that are in memory, each with the line that it begins on."""

    def __init__(self, path: str, items: list[tuple[int, Any]]) -> None:
        self.path, self.items = path, items

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        for i in indices:
            line, row = self.items[i]
            place = f"{self.path}, line {line}"
            yield place, row if isinstance(row, BadRow) else caught(as_object, row, place)


def caught(read: Callable[[Any, str], dict], raw: Any, place: str) -> dict | BadRow:
    try:
        return read(raw, place)
    except BadRow as error:
        return error


def json_list(path: str) -> Listed:
    """A file that is one JSON list. Raises ValueError: nothing tells where a broken one goes on."""
    text = read_text(path)
    items, line, position, counted = [], 1, text.index("[") + 1, 0
    try:
        while True:
            position += len(text[position:]) - len(text[position:].lstrip(" \t\r\n,"))
            if text[position : position + 1] == "]":
                return Listed(path, items)
            line += text.count("\n", counted, position)
            counted = position
            row, position = STRICT_JSON.raw_decode(text, position)
            items.append((line, row))
    except (ValueError, RecursionError) as error:
        where = line + text.count("\n", counted, getattr(error, "pos", counted))
        raise ValueError(f"{path}, line {where}: not JSON: {error}") from error


def csv_rows(path: str) -> Listed:
    """Rows of a CSV or TSV file, whose first line names the columns."""
    csv.field_size_limit(LARGEST_ROW)
    items: list[tuple[int, Any]] = []
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter="\t" if path.endswith(".tsv") else ",", strict=True)
        header: list[str] | None = None
        while True:
            line = lines.line_num + 1
            try:
                cells = next(lines, None)
            except csv.Error as error:
                items.append((line, BadRow(f"{path}, line {line}", "not CSV", f"not CSV: {error}")))
                continue
            if cells is None:
                return Listed(path, items)
            if header is None:
                header = cells
                if len(set(header)) < len(header) or "" in header:
                    raise ValueError(f"{path}, line 1: columns {header}; wanted a name for each")
            elif cells and len(cells) != len(header):
                found = f"{len(cells)} cells; the header has {len(header)}"
                items.append((line, BadRow(f"{path}, line {line}", "not CSV", found)))
            elif cells:
                items.append((line, dict(zip(header, cells, strict=True))))


def text_rows(path: str, sample_by: str) -> Listed:
    """Plain text; a row is a line, a paragraph (up to a blank line) or the whole document."""
    text = read_text(path, errors="surrogateescape").replace("\r\n", "\n")
    end = {"line": "\n", "paragraph": "\n\n", "document": None}[sample_by]
    items, line = [], 1
    for part in text.split(end) if end else [text]:
        if part.strip():
            blank = len(part) - len(part.lstrip("\n"))
            items.append((line + blank, {"text": part.strip("\n")}))
        line += part.count("\n") + len(end or "")
    return Listed(path, items)


def read_text(path: str, errors: str = "strict") -> str:
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 at byte {error.start}") from error


class Table:
    """A `datasets.Dataset`: a hub data set, or a Parquet or Arrow file."""

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, table

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        indices = list(indices)
        for start in range(0, len(indices), BLOCK):
            block = indices[start : start + BLOCK]
            columns = self.table[block]  # one by one takes ten times as long
            for j, i in enumerate(block):
                yield f"{self.name} row {i}", {key: values[j] for key, values in columns.items()}


class Joined:
    """The files of a folder or of a pattern, one behind the other."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers
        self.ends = []
        for reader in readers:
            self.ends.append(len(reader) + (self.ends[-1] if self.ends else 0))

    def __len__(self) -> int:
        return self.ends[-1]

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        for i in indices:
            which = bisect.bisect_right(self.ends, i)
            start = self.ends[which - 1] if which else 0
            yield from self.readers[which].rows([i - start])


class Where:
    """The rows of a reader whose columns have the wanted values; bad rows stay, to be told."""

    def __init__(self, reader: Reader, wanted: dict) -> None:
        self.reader = reader
        rows = enumerate(raw for _, raw in reader.rows(range(len(reader))))
        self.places = [
            i
            for i, raw in rows
            if isinstance(raw, BadRow) or all(raw.get(key) == wanted[key] for key in wanted)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, indices: Iterable[int]) -> Iterator[tuple[str, dict | BadRow]]:
        return self.reader.rows(self.places[i] for i in indices)


def read_file(path: str, sample_by: str = "line") -> Reader:
    """The reader of one local file. Raises ValueError where it is empty or another format."""
    with open(path, "rb") as file:
        head = file.read(4096)
    ending = Path(path).suffix
    if ending in (".parquet", ".arrow"):
        return read_table(path, ending[1:])
    for magic, what in BINARY.items():
        if head.startswith(magic):
            raise ValueError(f"{path}: this is {what}")
    if ending in (".csv", ".tsv"):
        reader: Reader = csv_rows(path)
    elif ending == ".txt":
        reader = text_rows(path, sample_by)
    elif ending == ".json" and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        reader = json_list(path)
    else:
        reader = JsonLines(path)
    if not len(reader):
        raise ValueError(f"{path}: no rows")
    return reader


def read_table(path: str, kind: str) -> Table:
    from datasets import load_dataset  # seconds to import, and other files do without
    from datasets.exceptions import DatasetsError

    try:
        table = load_dataset(kind, data_files=path, split="train")
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{path}: no {kind} file: {error.__cause__ or error}") from error
    if not len(table):
        raise ValueError(f"{path}: no rows")
    return Table(f"{path},", table)
