"""Rows of a recipe's sources, each as {"messages": [...]} or {"text": ...}.

Keys of one source:
    path      a file (.jsonl .json .csv .tsv .txt .parquet .arrow), a folder or a pattern of such
              files, or the name of a hub data set
    name, split, revision   configuration, split (train by default) and revision of a hub data set
    count     rows to draw, by `mixture_seed`; without: all
    weight    in place of count: a share of `mixture_rows`; without that, of the largest mixture in
              which no row repeats
    where     {column: value}: only the rows that have these values
    columns   {our name: its name}, for rows that call their fields otherwise; {id: null}: equal
              ids are no fault
    roles     {its name: our role}, for messages whose roles are none of `kd.data.conversations`
    system    a system prompt put in front of rows that have none
    sample_by   rows of a .txt file: line (by default), paragraph or document
What makes a row: see `kd.data.conversations`.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from kd.data.conversations import COLUMNS, ROLES, to_row
from kd.data.files import ENDINGS, BadRow, Joined, JsonLines, Reader, Table, Where, read_file
from kd.recipe import unknown_key

TEXT_KEYS = ("path", "name", "split", "revision", "system", "sample_by")
KEYS = (*TEXT_KEYS, "where", "count", "weight", "columns", "roles")


def check_sources(sources: list[dict]) -> None:
    """Refuse wrong keys and missing files before anything is loaded. Raises ValueError."""
    for source in sources:
        for key in source:
            if key not in KEYS:
                raise ValueError(f"data: {unknown_key(key, list(KEYS))}")
        path = source.get("path")
        if not isinstance(path, str) or not path:
            raise ValueError(f"data: a source without path: {source}")
        check_values(source, f"data: {path}")
        files = local_files(path)
        if files == []:
            raise ValueError(
                f"data: no file {path}; wanted {' '.join(ENDINGS)}, a folder or a pattern of "
                "these, or the name of a data set"
            )
        kinds = Counter(Path(file).suffix for file in files or [])
        if len(kinds) > 1:
            raise ValueError(
                f"data: {path} has files of several kinds, {dict(kinds)}; say which, as in "
                f"{path.rstrip('/')}/*{min(kinds)}"
            )


def check_values(source: dict, where: str) -> None:
    for key in TEXT_KEYS:
        if not isinstance(source.get(key, ""), str):
            raise ValueError(f"{where}: {key} {source[key]!r}; wanted a string")
    count, weight = source.get("count", 1), source.get("weight", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where}: count {count!r}; wanted a whole number above 0")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight > 0:
        raise ValueError(f"{where}: weight {weight!r}; wanted a number above 0")
    if "count" in source and "weight" in source:
        raise ValueError(f"{where}: count and weight; wanted one of them")
    if source.get("sample_by", "line") not in ("line", "paragraph", "document"):
        raise ValueError(
            f"{where}: sample_by {source['sample_by']}; wanted line, paragraph, document"
        )
    columns, roles = source.get("columns", {}), source.get("roles", {})
    chosen = source.get("where", {})
    for key, value in (("columns", columns), ("roles", roles), ("where", chosen)):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {key} {value!r}; wanted {{name: name}}")
    for name, theirs in columns.items():
        if name not in COLUMNS:
            raise ValueError(f"{where}: columns: {unknown_key(name, list(COLUMNS))}")
        if not isinstance(theirs, str) and not (name == "id" and theirs is None):
            raise ValueError(f"{where}: columns: {name}: {theirs!r}; wanted the name of a column")
    for role in roles.values():
        if role not in ROLES:
            raise ValueError(f"{where}: roles: {role!r}; wanted one of {', '.join(ROLES)}")


def local_files(path: str) -> list[str] | None:
    """The files that a path means, in order of their names; None for the name of a hub data set."""
    if any(mark in path for mark in "*?["):
        base = Path(path)
        found = base.anchor and Path(base.anchor).glob(str(base.relative_to(base.anchor)))
        found = found or Path().glob(path)
        return sorted(str(file) for file in found if file.suffix in ENDINGS and file.is_file())
    if Path(path).is_dir():
        found = Path(path).rglob("*")
        return sorted(str(file) for file in found if file.suffix in ENDINGS and file.is_file())
    if path.endswith(ENDINGS) or path.startswith(("/", "./", "../", "~")):
        return [path] if Path(path).is_file() and path.endswith(ENDINGS) else []
    return None


def open_source(source: dict) -> Reader:
    """Raises ValueError where nothing can be read."""
    reader = open_whole(source)
    if "where" not in source:
        return reader
    chosen = Where(reader, source["where"])
    if not len(chosen):
        raise ValueError(
            f"data: {source['path']}: none of its {len(reader)} rows has {source['where']} (where)"
        )
    return chosen


def open_whole(source: dict) -> Reader:
    files = local_files(source["path"])
    if files is None:
        return Table(f"{source['path']}, {source.get('split', 'train')}", hub_table(source))
    readers = [read_file(file, source.get("sample_by", "line")) for file in files]
    return readers[0] if len(readers) == 1 else Joined(readers)


def hub_table(source: dict):
    from datasets import load_dataset  # seconds to import, and local files do without
    from datasets.exceptions import DatasetsError

    split, revision = source.get("split", "train"), source.get("revision")
    try:
        return load_dataset(source["path"], source.get("name"), split=split, revision=revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"data: {source['path']}, {split}: cannot be loaded: {error}") from error


def load_rows(sources: list[dict], seed: int, on_bad_row: str = "error") -> list[dict]:
    """All rows of a mixture, source after source; the Trainer's sampler shuffles them.

    Raises ValueError naming file and line where a row has no usable fields.
    """
    dropped: Counter = Counter()
    return [row for _, row in read_rows(sources, seed, on_bad_row, dropped)]


def source_rows(source: dict, seed: int, convert: Callable[..., dict] = to_row) -> list[dict]:
    """The rows of one source. Raises ValueError naming file and line."""
    return [row for _, row in read_rows([source], seed, convert=convert)]


def read_rows(
    sources: list[dict],
    seed: int,
    on_bad_row: str = "error",
    dropped: Counter | None = None,
    convert: Callable[[dict, dict, str], dict] = to_row,
    mixture_rows: int | None = None,
    train_rows: int | None = None,
) -> Iterator[tuple[str, dict]]:
    """(place, row) of all rows of a mixture.

    A bad row raises BadRow, or is counted in `dropped` by its kind, and another one of its source
    is drawn in its place where there is a count.
    """
    check_sources(sources)
    readers = [open_source(source) for source in sources]
    counts = planned_counts(sources, readers, mixture_rows, train_rows)
    dropped = Counter() if dropped is None else dropped
    for source, reader, count in zip(sources, readers, counts, strict=True):
        yield from drawn_rows(source, reader, count, seed, on_bad_row, dropped, convert)


def planned_counts(
    sources: list[dict], readers: list[Reader], mixture_rows: int | None, train_rows: int | None
) -> list[int | None]:
    """Rows of each source; None: all, in their order. Raises ValueError where there are fewer."""
    counts: list[int | None] = [source.get("count") for source in sources]
    weighted = [i for i, source in enumerate(sources) if "weight" in source]
    if mixture_rows and not weighted:
        raise ValueError("mixture_rows: given, and no source has a weight to share it by")
    if weighted:
        weights = [sources[i]["weight"] for i in weighted]
        most = min(
            len(readers[i]) * sum(weights) / w for i, w in zip(weighted, weights, strict=True)
        )
        for i, share in zip(weighted, shares(mixture_rows or int(most), weights), strict=True):
            counts[i] = share
    if train_rows:
        planned = [
            len(reader) if count is None else count
            for reader, count in zip(readers, counts, strict=True)
        ]
        if train_rows < sum(planned):
            counts = list(shares(train_rows, planned))
    for source, reader, count in zip(sources, readers, counts, strict=True):
        if count is not None and count > len(reader):
            raise ValueError(
                f"data: {source['path']}: count {count}, but it has {len(reader)} rows"
            )
    return counts


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` split by weight into whole numbers, the largest remainders rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def drawn_rows(
    source: dict,
    reader: Reader,
    count: int | None,
    seed: int,
    on_bad_row: str,
    dropped: Counter,
    convert: Callable[[dict, dict, str], dict],
) -> Iterator[tuple[str, dict]]:
    path, every, good = source["path"], range(len(reader)), 0
    # Path in the seed: two sources of equal length do not draw the same numbers.
    chosen = every if count is None else random.Random(f"{seed} {path}").sample(every, count)
    ids: dict = {}
    while chosen:
        missing = 0
        for place, raw in reader.rows(chosen):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                check_id(raw, source, place, ids)
                row = convert(raw, source, place)
            except BadRow as error:
                if on_bad_row == "error":
                    raise
                dropped[error.kind] += 1
                missing += 1
                continue
            good += 1
            yield place, row
        if count is None or not missing:
            return
        every = sorted(set(every) - set(chosen))
        if len(every) < missing:
            raise ValueError(
                f"data: {path}: count {count}, but of {len(reader)} rows only "
                f"{good + len(every)} can be used; dropped: {dict(dropped)}"
            )
        chosen = random.Random(f"{seed} {path} {good}").sample(every, missing)


def check_id(raw: dict, source: dict, place: str, ids: dict) -> None:
    """Raise BadRow where an earlier row of the source has the same id."""
    column = source.get("columns", {}).get("id", "id")
    identity = raw.get(column) if column else None
    if not isinstance(identity, str | int) or identity == "":
        return
    if identity in ids:
        found = f"{column} {identity!r} is that of {ids[identity]}; wanted each once"
        remedy = "(columns: {id: null} where equal ids are meant)"
        raise BadRow(place, "repeated id", f"{found} {remedy}")
    ids[identity] = place


def read_jsonl(path: str) -> tuple[list[dict], Callable[[int], str]]:
    """All rows of a file of JSON lines, and the place of each. Raises BadRow naming the line."""
    lines = JsonLines(path)
    places, rows = [], []
    for place, row in lines.rows(range(len(lines))):
        if isinstance(row, BadRow):
            raise row
        places.append(place)
        rows.append(row)
    return rows, places.__getitem__
