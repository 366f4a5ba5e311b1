"""Encoding in several processes, results in order and never more than a few chunks in memory."""

import itertools
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from kd.data.files import BadRow
from kd.data.masks import CutRow, Encoder

SMALL = 8  # chunks that one process encodes before others could have started

_encoder: Encoder  # of a worker


def worker_count(wanted: int) -> int:
    return wanted or len(os.sched_getaffinity(0))


def encode_in_order(
    encoder: Encoder, chunks: Iterator[list], workers: int
) -> Iterator[list[CutRow | BadRow]]:
    """The result of each chunk, in order. Raises what an encoder raises."""
    first = list(itertools.islice(chunks, SMALL))
    if workers == 1 or len(first) < SMALL:
        yield from map(encoder, itertools.chain(first, chunks))
        return
    pool = ProcessPoolExecutor(
        workers,
        # Forked, they have the tokenizer at once, and nothing of ours is imported again.
        mp_context=multiprocessing.get_context("fork"),
        initializer=start_worker,
        initargs=(encoder, os.getpid()),
    )
    pending: deque = deque()
    try:
        for chunk in itertools.chain(first, chunks):
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(encoder: Encoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()


def die_with(parent: int) -> None:
    """A parent that is killed cannot tell its workers, and they would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def encode(chunk: list) -> list[CutRow | BadRow]:
    return _encoder(chunk)
