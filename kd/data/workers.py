"""Forked workers that always start, and encoding in several of them.

Results come in order, and never more than a few chunks are in memory.
"""

import itertools
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen

from kd.data.encoding import CutRow, Encoder
from kd.data.files import BadRow
from kd.run.signals import SIGNALS

SMALL = 8  # chunks that one process encodes before others could have started
PATIENCE = 5.0  # seconds until a worker is replaced that has not begun; it takes milliseconds

_encoder: Encoder  # of a worker


class Worker(ForkProcess):
    """A process that signals to the whole job do not end, and whose start cannot hang."""

    def start(self) -> None:
        # A worker_init_fn comes too late: one that has just been started would die before it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a child inherits it
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _Popen(process: "Worker") -> Popen:
        """Fork until a child says that it is there, and then let it go on.

        Before Python 3.12 a child waits for ever inside of fork() where another thread (gloo's, NCCL's)
        was just entering Python: one in some hundred, at the turn of an epoch.
        """
        while True:
            ours, process.theirs = socket.socketpair()
            process.ours = ours
            with ours:
                child = ForkProcess._Popen(process)
                process.theirs.close()
                if select.select([ours], [], [], PATIENCE)[0]:
                    ours.recv(4)  # nothing, where it is dead; the closed socket lets it go on
                    return child
                child.kill()  # it holds nothing yet
                child.wait()

    def run(self) -> None:
        self.ours.close()
        with self.theirs:
            self.theirs.send(b"here")
            self.theirs.recv(1)
        super().run()


class Workers(ForkContext):
    """A multiprocessing context, for a DataLoader or a pool."""

    Process = Worker


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
        mp_context=Workers(),
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
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a broken pool ends its workers by one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()


def die_with(parent: int) -> None:
    """A parent that is killed cannot tell its workers, and they would wait for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def encode(chunk: list) -> list[CutRow | BadRow]:
    return _encoder(chunk)
