"""Tokenised rows on the disk, under a fingerprint of everything that decides them.

One process prepares them and the others wait for its lock, on one machine or on a shared disk;
there is no collective call that could time out, and whoever dies leaves nothing that is half there.
A folder holds ids (int32) and mask (bool) of all rows one behind the other, where each row ends,
and report.json; it is mapped into memory, so processes on one machine share its pages. Rows that are
aligned to a teacher with another tokenizer have its ids and the numbers of chunks beside them.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kd.data.alignment import AlignedEncoder, AlignedRow, teacher_row
from kd.data.encoding import (
    CHUNK,
    IGNORE_INDEX,
    EncodedRow,
    Encoder,
    EncodingReport,
    count_rows,
    require_rows,
)
from kd.data.packing import pack_lengths
from kd.data.sources import check_sources, hub_table, local_files, read_rows
from kd.data.vocabularies import shared_vocabulary
from kd.data.workers import encode_in_order, worker_count

ENDS = {"ids": "ends", "teacher_ids": "teacher_ends"}  # where a row's part of a file ends
FORMAT = 1  # raise it where equal settings come to make other rows


@dataclass(frozen=True)
class RowSettings:
    """What decides the rows beside their sources and their tokenizer."""

    max_length: int
    seed: int = 0
    on_bad_row: str = "error"
    on_long_row: str = "cut"
    mixture_rows: int | None = None
    train_rows: int | None = None


class TokenisedRows(Sequence):
    """Rows of one cache folder, each a list of documents: one, or after `packed` several."""

    def __init__(self, folder: Path, bins: list[list[int]] | None = None) -> None:
        self.folder = folder
        self.ids = np.memmap(folder / "ids", np.int32, "r")
        self.mask = np.memmap(folder / "mask", np.bool_, "r")
        self.ends = np.fromfile(folder / "ends", np.int64)
        self.report = read_report(folder)
        self.bins = bins

    def __len__(self) -> int:
        return len(self.ends if self.bins is None else self.bins)

    def __getitem__(self, i: int) -> list[EncodedRow]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        if self.bins is None:
            return [self.document(i % len(self))]
        return [self.document(j) for j in self.bins[i]]

    def packed(self, max_length: int) -> "TokenisedRows":
        """The same documents, as many a row as fit."""
        return type(self)(self.folder, pack_lengths(self.lengths, max_length))

    def subset(self, chosen: list[int]) -> "TokenisedRows":
        """These rows, in this order."""
        bins = [[i] for i in range(len(self))] if self.bins is None else self.bins
        return type(self)(self.folder, [bins[i] for i in chosen])

    def document(self, i: int) -> EncodedRow:
        part = between(self.ends, i)
        ids = self.ids[part]
        return EncodedRow(ids.tolist(), np.where(self.mask[part], ids, IGNORE_INDEX).tolist())

    @property
    def document_lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.per_row(self.document_lengths)

    @property
    def longest(self) -> int:
        """Tokens that any model reads of one row, at most."""
        return max(self.lengths)

    @property
    def targets(self) -> list[int]:
        """Target tokens of each row."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return self.per_row(np.add.reduceat(self.mask, starts, dtype=np.int64))

    def per_row(self, of_documents: np.ndarray) -> list[int]:
        if self.bins is None:
            return of_documents.tolist()
        return [int(of_documents[documents].sum()) for documents in self.bins]


class AlignedRows(TokenisedRows):
    """TokenisedRows with what a teacher of another tokenizer reads of each document."""

    def __init__(self, folder: Path, bins: list[list[int]] | None = None) -> None:
        super().__init__(folder, bins)
        self.teacher_ids = np.memmap(folder / "teacher_ids", np.int32, "r")
        self.chunks, self.teacher_chunks = (
            np.memmap(folder / name, np.int32, "r") for name in ("chunks", "teacher_chunks")
        )
        self.teacher_ends = np.fromfile(folder / "teacher_ends", np.int64)

    @property
    def longest(self) -> int:
        teachers = self.per_row(np.diff(self.teacher_ends, prepend=0))
        return max(super().longest, *teachers)

    def document(self, i: int) -> AlignedRow:
        row, part = super().document(i), between(self.teacher_ends, i)
        ids, chunks = self.teacher_ids[part], self.teacher_chunks[part]
        return AlignedRow(
            row.input_ids,
            row.labels,
            self.chunks[between(self.ends, i)].tolist(),
            teacher_row(ids, chunks),
            chunks.tolist(),
        )


def between(ends: np.ndarray, i: int) -> slice:
    """The place of row i, of rows that end there."""
    return slice(int(ends[i - 1]) if i else 0, int(ends[i]))


def read_report(folder: Path) -> EncodingReport:
    return EncodingReport(**json.loads((folder / "report.json").read_text()))


def tokenised_rows(
    sources: list[dict],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    cache: str,
    workers: int = 0,
    progress: bool = True,
    teacher: PreTrainedTokenizerBase | None = None,
) -> TokenisedRows:
    """The rows of the sources, from the cache where an earlier call has made them.

    With the tokenizer of a `teacher` they are aligned to it. Raises ValueError as `read_rows` and
    `encode_rows` do.
    """
    check_sources(sources)
    folder = Path(cache) / fingerprint(sources, settings, tokenizer, teacher)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_whole(folder):
        with alone(folder.with_suffix(".lock")):
            if not is_whole(folder):  # whoever had the lock before may have made it
                prepare(folder, sources, settings, tokenizer, workers, progress, teacher)
    return AlignedRows(folder) if teacher else TokenisedRows(folder)


def fingerprint(
    sources: list[dict],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None = None,
) -> str:
    """Equal for rows that are equal; the content of files counts, not only their names."""
    parts = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "settings": asdict(settings),
        "sources": sources,
        "contents": [content_of(source) for source in sources],
        **content_of_tokenizer(tokenizer),
    }
    if teacher:
        parts["teacher"] = content_of_tokenizer(teacher)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def content_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    if backend:  # what the last call left there
        backend |= {"truncation": None, "padding": None}
    return {
        "tokenizer": backend or tokenizer.get_vocab(),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }


def content_of(source: dict) -> str:
    files = local_files(source["path"])
    if files is None:
        return hub_table(source)._fingerprint  # of the data set's revision, configuration and split
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\n{Path(file).stat().st_size}\n".encode())
        with open(file, "rb") as content:
            while block := content.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether all bytes are there; a full disk or a lost machine may leave fewer."""
    try:
        report = read_report(folder)
        sizes = {name: (folder / name).stat().st_size for name in wanted_sizes(report)}
    except (OSError, ValueError):
        return False
    return sizes == wanted_sizes(report)


def wanted_sizes(report: EncodingReport) -> dict[str, int]:
    """Bytes of each file of a folder."""
    sizes = {"ids": 4 * report.tokens, "mask": report.tokens, "ends": 8 * report.kept}
    if report.teacher_tokens:
        other = {name: 4 * report.teacher_tokens for name in ("teacher_ids", "teacher_chunks")}
        sizes |= other | {"chunks": 4 * report.tokens, "teacher_ends": 8 * report.kept}
    return sizes


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Inside, no other process is; they wait, however long it takes.

    A POSIX lock: forked workers do not inherit it, and the system gives it back when we die.
    """
    with open(lock, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            start = time.monotonic()
            print(f"waiting for the process that prepares {lock.with_suffix('')}", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
            print(f"waited {time.monotonic() - start:.0f} s for the rows", flush=True)
        except OSError as error:
            raise ValueError(
                f"data_cache: no locks on the file system of {lock.parent} ({error}); take a folder "
                "on another one"
            ) from error
        yield


def prepare(
    folder: Path,
    sources: list[dict],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    workers: int,
    progress: bool,
    teacher: PreTrainedTokenizerBase | None,
) -> None:
    """Write the folder aside and rename it, so that it is whole or not there."""
    for torn in [*folder.parent.glob(f"{folder.name}.tmp-*"), folder]:
        shutil.rmtree(torn, ignore_errors=True)  # of a process that was killed
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    aside.mkdir()
    try:
        report = write_rows(aside, sources, settings, tokenizer, workers, progress, teacher)
        (aside / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_rows(
    folder: Path,
    sources: list[dict],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    workers: int,
    progress: bool,
    teacher: PreTrainedTokenizerBase | None,
) -> EncodingReport:
    bad: Counter = Counter()
    rows = read_rows(
        sources,
        settings.seed,
        settings.on_bad_row,
        bad,
        mixture_rows=settings.mixture_rows,
        train_rows=settings.train_rows,
    )
    encoder = encoder_of(settings, tokenizer, teacher)
    report, ends = EncodingReport(), Counter()
    bar = tqdm(desc="tokenising", unit="row", disable=not progress)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        open_file = functools.cache(lambda name: stack.enter_context(open(folder / name, "wb")))
        for results in encode_in_order(encoder, chunks(rows), worker_count(workers)):
            for row in count_rows(results, report):
                for name, array in row.arrays.items():
                    open_file(name).write(array.tobytes())
                    if name in ENDS:
                        ends[name] += len(array)
                        open_file(ENDS[name]).write(np.int64(ends[name]).tobytes())
            bar.update(len(results))
    report.read += bad.total()
    report.drop(bad.elements())
    require_rows(report)
    return report


def encoder_of(
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
) -> Encoder | AlignedEncoder:
    def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(tokenizer, settings.max_length, settings.on_long_row, settings.on_bad_row)

    if teacher is None:
        return encoder(tokenizer)
    vocabulary = shared_vocabulary(tokenizer, teacher)
    return AlignedEncoder(encoder(tokenizer), encoder(teacher), vocabulary)


def chunks(rows: Iterator) -> Iterator[list]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
