"""Prepare tokenised rows on disk, in a folder named by a fingerprint of all that determines them.

One process prepares the folder while the others wait for its lock, on one machine or on a shared
disk. There is no collective call that could time out, and a process that dies leaves nothing half
written. `kd.data.tokenised_rows` describes the files and reads them.
"""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kd.data.alignment import AlignedEncoder
from kd.data.encoding import ENCODE_BATCH, Encoder, EncodingReport, count_rows, require_rows
from kd.data.files import BadRow
from kd.data.row_checks import Check, checks_for, counted, row_key
from kd.data.sources import check_sources, hub_table, local_files, read_rows
from kd.data.tokenised_rows import AlignedRows, TokenisedRows, read_report
from kd.data.vocabularies import shared_vocabulary
from kd.data.workers import encode_in_order, worker_count
from kd.distributed import print_rank0
from kd.run.atomic import atomic_path

ENDS = {"ids": "ends", "teacher_ids": "teacher_ends"}  # file of tokens: file of its rows' ends
FORMAT = 2  # increase it when the same settings come to make other rows


@dataclass(frozen=True)
class RowSettings:
    """The settings that determine the rows, in addition to sources and tokenizer."""

    max_length: int
    seed: int = 0
    on_bad_row: str = "error"
    on_long_row: str = "cut"
    mixture_rows: int | None = None
    train_rows: int | None = None
    control_tokens: str = "split"


def tokenised_rows(
    sources: list[dict],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    cache: str,
    workers: int = 0,
    progress: bool = True,
    teacher: PreTrainedTokenizerBase | None = None,
) -> TokenisedRows:
    """Return the rows of the sources, from the cache if an earlier call prepared them.

    With `teacher`, the tokenizer of a teacher, they are aligned to it. Raises ValueError as
    `read_rows` and `encode_rows` do, or if the cache folder's file system has no locks.
    """
    check_sources(sources)
    folder = Path(cache) / fingerprint(sources, settings, tokenizer, teacher)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_whole(folder):
        with locked(folder.with_suffix(".lock")):
            if not is_whole(folder):  # the process that held the lock may have prepared it
                encoder = make_encoder(settings, tokenizer, teacher)
                checks = checks_for(settings.control_tokens, *filter(None, (tokenizer, teacher)))
                prepare(folder, sources, settings, encoder, checks, workers, progress)
    return AlignedRows(folder) if teacher else TokenisedRows(folder)


def fingerprint(
    sources: list[dict],
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None = None,
) -> str:
    """Return a hash of all that determines the rows; files count by their content."""
    parts = {
        "format": FORMAT,
        "versions": [transformers.__version__, tokenizers.__version__],
        "settings": asdict(settings),
        "sources": sources,
        "contents": [source_content(source) for source in sources],
        **tokenizer_content(tokenizer),
    }
    if teacher:
        parts["teacher"] = tokenizer_content(teacher)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return everything of a tokenizer that determines ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    if backend:  # these two are left over from the tokenizer's last call
        backend |= {"truncation": None, "padding": None}
    return {
        "tokenizer": backend or tokenizer.get_vocab(),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }


def source_content(source: dict) -> str:
    """Return a hash of the files of a source, or the fingerprint of its hub data set."""
    files = local_files(source["path"])
    if files is None:
        return hub_table(source)._fingerprint  # of revision, configuration and split
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\n{Path(file).stat().st_size}\n".encode())
        with open(file, "rb") as content:
            while block := content.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether all files have their full size; a full disk or a lost machine may truncate them."""
    try:
        report = read_report(folder)
        expected = expected_sizes(report)
        sizes = {name: (folder / name).stat().st_size for name in expected}
    except (OSError, ValueError):
        return False
    return sizes == expected


def expected_sizes(report: EncodingReport) -> dict[str, int]:
    """Return the bytes of each file of a folder with this report."""
    sizes = {"ids": 4 * report.tokens, "mask": report.tokens}
    sizes |= {"ends": 8 * report.kept, "keys": 8 * report.kept}
    if report.teacher_tokens:
        other = {name: 4 * report.teacher_tokens for name in ("teacher_ids", "teacher_chunks")}
        sizes |= other | {"chunks": 4 * report.tokens, "teacher_ends": 8 * report.kept}
    return sizes


@contextlib.contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for it as long as it takes.

    It is a POSIX lock: forked workers do not inherit it, and the system releases it if this process
    dies. Raises ValueError if the file system has no locks.
    """
    with open(lock, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The other ranks of a run always wait for rank 0, which shows the progress.
            print_rank0(f"waiting for the process that prepares {lock.with_suffix('')}")
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"data_cache: the file system of {lock.parent} has no file locks ({error}); set "
                "data_cache to a folder on another one"
            ) from error
        yield


def prepare(
    folder: Path,
    sources: list[dict],
    settings: RowSettings,
    encoder: Encoder | AlignedEncoder,
    checks: dict[str, Check],
    workers: int,
    progress: bool,
) -> None:
    """Encode and check the rows of the sources into a temporary folder and rename it to `folder`.

    So `folder` is whole or absent. Raises ValueError as `tokenised_rows` does.
    """
    for leftover in [*folder.parent.glob(f"{folder.name}.tmp-*"), folder]:
        shutil.rmtree(leftover, ignore_errors=True)  # of a process that was killed
    bad: Counter = Counter()
    rows = read_rows(
        sources,
        settings.seed,
        settings.on_bad_row,
        bad,
        mixture_rows=settings.mixture_rows,
        train_rows=settings.train_rows,
    )
    report, ends = EncodingReport(), Counter()
    unfinished = atomic_path(folder, folder.with_name(f"{folder.name}.tmp-{os.getpid()}"))
    with unfinished as temporary, contextlib.ExitStack() as stack:
        temporary.mkdir()
        bar = stack.enter_context(tqdm(desc="tokenising", unit="row", disable=not progress))
        open_file = functools.cache(lambda name: stack.enter_context(open(temporary / name, "wb")))
        keys: deque[list[int]] = deque()  # of the batches that are being encoded
        batches = with_keys(batched(counted(rows, checks, report.suspicious), ENCODE_BATCH), keys)
        for results in encode_in_order(encoder, batches, worker_count(workers)):
            kept = [not isinstance(result, BadRow) for result in results]
            found = np.array(keys.popleft(), np.uint64)[kept]
            open_file("keys").write(found.tobytes())
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
        (temporary / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")


def make_encoder(
    settings: RowSettings,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
) -> Encoder | AlignedEncoder:
    """Make the encoder of these settings; it aligns rows if there is a teacher's tokenizer."""

    def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
        return Encoder(
            tokenizer,
            settings.max_length,
            settings.on_long_row,
            settings.on_bad_row,
            settings.control_tokens,
        )

    if teacher is None:
        return encoder(tokenizer)
    vocabulary = shared_vocabulary(tokenizer, teacher)
    return AlignedEncoder(encoder(tokenizer), encoder(teacher), vocabulary)


def with_keys(batches: Iterable[list], keys: deque[list[int]]) -> Iterator[list]:
    """Yield the batches of (place, row) pairs and append the key of every row to `keys`."""
    for batch in batches:
        keys.append([row_key(row) for _, row in batch])
        yield batch


def batched(rows: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` rows; the last one may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch
