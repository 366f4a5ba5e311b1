"""Read the rows of a recipe's sources as {"messages": [...]} or {"text": ...}.

Keys of a source:
    path       a file (.jsonl .json .csv .tsv .txt .parquet .arrow), a folder or glob pattern of
               such files, or the name of a hub data set
    name, split, revision   configuration, split (default train) and revision of a hub data set
    count      number of rows to draw at random, by `mixture_seed`; default: all rows
    weight     instead of count: the share of `mixture_rows`; without mixture_rows, of the largest
               mixture in which no row repeats
    where      {column: value}: only rows with these values
    columns    {our name: its name}, if the rows name their fields differently; {id: null} allows
               repeated ids
    roles      {its name: our role}, for roles that `kd.data.conversations` does not know
    system     a system prompt for rows without one
    sample_by  what a row of a .txt file is: line (default), paragraph or document
`kd.data.conversations` lists the formats of a row.
"""

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

from kd.data.conversations import COLUMNS, ROLES, to_row
from kd.data.files import (
    BadRow,
    Concatenation,
    FilteredRows,
    JsonLines,
    Reader,
    Table,
    file_kind,
    read_file,
)
from kd.data.local_files import local_files
from kd.model_files import hub_problem
from kd.recipe import attempt, unknown_key, will_exist

TEXT_KEYS = ("path", "name", "split", "revision", "system", "sample_by")
KEYS = (*TEXT_KEYS, "where", "count", "weight", "columns", "roles")


def check_sources(sources: list[dict]) -> None:
    """Note wrong keys, wrong values and missing files of each source; loads nothing.

    Raises ValueError outside of `all_mistakes`.
    """
    for source in sources:
        attempt(check_source, source)


def check_source(source: dict) -> None:
    """Raise ValueError for wrong keys, wrong values or missing files of one source."""
    for key in source:
        if key not in KEYS:
            raise ValueError(f"data: {unknown_key(key, list(KEYS))}")
    path = source.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError(f"data: source {source} has no path; wanted a file or a data set name")
    check_values(source, f"data: {path}")
    files = None if will_exist(path) else local_files(path)
    if files is None:
        return
    kinds = Counter(map(file_kind, files))
    if len(kinds) > 1:
        raise ValueError(
            f"data: {path} has files of several kinds, {dict(kinds)}; wanted one kind, for "
            f"example {path.rstrip('/')}/*{min(kinds)}"
        )
    for key in ("name", "split", "revision"):
        if key in source:
            raise ValueError(
                f"data: {path}: {key} {source[key]}, but this is a local file or folder; only a "
                "hub data set has one, remove the key"
            )
    if "sample_by" in source and ".txt" not in kinds:
        raise ValueError(f"data: {path}: sample_by has an effect on .txt files only; remove it")
    closed = next((file for file in files if not os.access(file, os.R_OK)), None)
    if closed:
        raise ValueError(f"data: {closed}: no permission to read it; change its mode or owner")


def check_values(source: dict, where: str) -> None:
    """Raise ValueError, beginning with `where`, if a value of the source is invalid."""
    for key in TEXT_KEYS:
        if not isinstance(source.get(key, ""), str):
            raise ValueError(f"{where}: {key} {source[key]!r}; wanted a string")
    count, weight = source.get("count", 1), source.get("weight", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where}: count {count!r}; wanted a whole number above 0")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
        raise ValueError(f"{where}: weight {weight!r}; wanted a number above 0")
    if "count" in source and "weight" in source:
        raise ValueError(f"{where}: has count and weight; wanted one of them")
    if source.get("sample_by", "line") not in ("line", "paragraph", "document"):
        raise ValueError(
            f"{where}: sample_by {source['sample_by']}; wanted line, paragraph or document"
        )
    columns, roles = source.get("columns", {}), source.get("roles", {})
    chosen = source.get("where", {})
    for key, value in (("columns", columns), ("roles", roles), ("where", chosen)):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {key} {value!r}; wanted a mapping {{name: name}}")
    for name, theirs in columns.items():
        if name not in COLUMNS:
            raise ValueError(f"{where}: columns: {unknown_key(name, list(COLUMNS))}")
        if not isinstance(theirs, str) and not (name == "id" and theirs is None):
            raise ValueError(f"{where}: columns: {name}: {theirs!r}; wanted the name of a column")
    names = [theirs for theirs in columns.values() if theirs is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{where}: columns: {twice} is given twice; wanted a column for each name")
    for role in roles.values():
        if role not in ROLES:
            raise ValueError(f"{where}: roles: {role!r}; wanted one of {', '.join(ROLES)}")


def open_source(source: dict) -> Reader:
    """Open a source and apply its `where`. Raises ValueError if it has no rows."""
    reader = _open_unfiltered(source)
    if "where" not in source:
        return reader
    filtered = FilteredRows(reader, source["where"])
    if not len(filtered):
        raise ValueError(
            f"data: {source['path']}: where: none of its {len(reader)} rows has {source['where']}; "
            "wanted at least one"
        )
    return filtered


def _open_unfiltered(source: dict) -> Reader:
    files = local_files(source["path"])
    if files is None:
        return Table(f"{source['path']}, {source.get('split', 'train')}", hub_table(source))
    readers = [read_file(file, source.get("sample_by", "line")) for file in files]
    return readers[0] if len(readers) == 1 else Concatenation(readers)


def hub_table(source: dict):
    """Load a hub data set. Raises ValueError if it cannot be loaded.

    If the hub cannot be reached, only its cache is read; datasets would ask for half a minute.
    """
    import datasets  # takes seconds to import; local files do not need it
    from datasets.exceptions import DatasetsError

    split, revision = source.get("split", "train"), source.get("revision")
    problem = hub_problem(source["path"], "dataset")
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or problem is not None
    try:
        return datasets.load_dataset(
            source["path"], source.get("name"), split=split, revision=revision
        )
    except (DatasetsError, OSError, ValueError) as error:
        reason = problem or " ".join(str(error).split())
        raise ValueError(
            f"data: {source['path']}, split {split}: no file or folder here, and as a hub data set "
            f"it cannot be loaded: {reason}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def load_rows(
    sources: list[dict],
    seed: int,
    on_bad_row: str = "error",
    convert: Callable[[dict, dict, str], dict] = to_row,
) -> list[dict]:
    """Return all rows of a mixture, source by source; the trainer's sampler shuffles them.

    Raises ValueError with file and line for a bad row, unless on_bad_row is `drop`.
    """
    return [row for _, row in read_rows(sources, seed, on_bad_row, convert=convert)]


def read_rows(
    sources: list[dict],
    seed: int,
    on_bad_row: str = "error",
    dropped: Counter | None = None,
    convert: Callable[[dict, dict, str], dict] = to_row,
    mixture_rows: int | None = None,
    train_rows: int | None = None,
) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) for all rows of a mixture.

    A bad row raises BadRow. If on_bad_row is `drop`, it is counted in `dropped` by its kind, and a
    source with a count draws another row in its place. Raises ValueError as `planned_counts` does.
    """
    check_sources(sources)
    readers = [open_source(source) for source in sources]
    counts = planned_counts(sources, readers, mixture_rows, train_rows)
    dropped = Counter() if dropped is None else dropped
    for source, reader, count in zip(sources, readers, counts, strict=True):
        yield from _draw_rows(source, reader, count, seed, on_bad_row, dropped, convert)


def planned_counts(
    sources: list[dict], readers: list[Reader], mixture_rows: int | None, train_rows: int | None
) -> list[int | None]:
    """Return the number of rows to draw from each source; None means all, in their order.

    Raises ValueError if a source has fewer rows, or for mixture_rows without any weight.
    """
    counts: list[int | None] = [source.get("count") for source in sources]
    weighted = [i for i, source in enumerate(sources) if "weight" in source]
    if mixture_rows and not weighted:
        raise ValueError(
            f"mixture_rows: {mixture_rows}, but no source has a weight; give the sources weights"
        )
    if weighted:
        weights = [sources[i]["weight"] for i in weighted]
        most = min(
            len(readers[i]) * sum(weights) / w for i, w in zip(weighted, weights, strict=True)
        )
        for i, share in zip(weighted, shares(mixture_rows or int(most), weights), strict=True):
            if not share:
                raise ValueError(
                    f"data: {sources[i]['path']}: weight {sources[i]['weight']} is too small for a "
                    "single row; wanted a larger one, or larger mixture_rows"
                )
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
                f"data: {source['path']}: count {count}, but it has {len(reader)} rows; wanted no "
                "more than that"
            )
    return counts


def shares(total: int, weights: list[float]) -> list[int]:
    """Split `total` into whole numbers by weight; the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _draw_rows(
    source: dict,
    reader: Reader,
    count: int | None,
    seed: int,
    on_bad_row: str,
    dropped: Counter,
    convert: Callable[[dict, dict, str], dict],
) -> Iterator[tuple[str, dict]]:
    path, undrawn, good = source["path"], range(len(reader)), 0
    # The path is part of the seed: sources of equal length must not draw the same indices.
    chosen = undrawn if count is None else random.Random(f"{seed} {path}").sample(undrawn, count)
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
        undrawn = sorted(set(undrawn) - set(chosen))
        if len(undrawn) < missing:
            raise ValueError(
                f"data: {path}: count {count}, but of {len(reader)} rows only "
                f"{good + len(undrawn)} can be used (dropped: {dict(dropped)}); wanted no more"
            )
        chosen = random.Random(f"{seed} {path} {good}").sample(undrawn, missing)


def check_id(raw: dict, source: dict, place: str, ids: dict) -> None:
    """Raise BadRow if an earlier row of the source has the same id; `ids` maps ids to places."""
    column = source.get("columns", {}).get("id", "id")
    identity = raw.get(column) if column else None
    if not isinstance(identity, str | int) or identity == "":
        return
    if identity in ids:
        found = f"{column} {identity!r} is also the id of {ids[identity]}; wanted unique ids"
        remedy = "(columns: {id: null} allows repeated ids)"
        raise BadRow(place, "repeated id", f"{found} {remedy}")
    ids[identity] = place


def read_jsonl(path: str) -> list[dict]:
    """Return all rows of a JSON Lines file.

    Raises BadRow with the line for a row that is not a JSON object.
    """
    lines, rows = JsonLines(path), []
    for _, row in lines.rows(range(len(lines))):
        if isinstance(row, BadRow):
            raise row
        rows.append(row)
    return rows
