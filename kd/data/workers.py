"""Worker processes that are sure to start, and encoding of rows in several of them.

Results come in order, and only a few batches of rows are in memory at a time.
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

from kd.data.alignment import AlignedEncoder
from kd.data.encoding import EncodedRow, Encoder
from kd.data.files import BadRow
from kd.run.signals import SIGNALS

MIN_BATCHES = 8  # with fewer, one process is done before others could have started
START_TIMEOUT = 5.0  # seconds until a worker is replaced; starting takes milliseconds

_encoder: Encoder | AlignedEncoder  # of a worker process


class Worker(ForkProcess):
    """A forked process that ignores the stop signals of the job and whose start cannot hang."""

    def start(self) -> None:
        """Start the process with the stop signals blocked.

        A worker_init_fn would block them too late: a signal could end the process before it runs.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the child inherits the mask
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _Popen(process: "Worker") -> Popen:
        """Fork until a child reports that it runs, then let it continue.

        Before Python 3.12 a child hangs inside fork() if another thread (of gloo or NCCL) is just
        entering Python. It happened to about one child in a hundred, between two epochs.
        """
        while True:
            ours, process.theirs = socket.socketpair()
            process.ours = ours
            with ours:
                child = ForkProcess._Popen(process)
                process.theirs.close()
                if select.select([ours], [], [], START_TIMEOUT)[0]:
                    ours.recv(4)  # empty if the child died; closing the socket lets it continue
                    return child
                child.kill()  # it holds no resources yet
                child.wait()

    def run(self) -> None:
        """Report to the parent, wait for its permission, and run."""
        self.ours.close()
        with self.theirs:
            self.theirs.send(b"here")
            self.theirs.recv(1)
        super().run()


class Workers(ForkContext):
    """A multiprocessing context of `Worker` processes, for a DataLoader or a pool."""

    Process = Worker


def worker_count(setting: int) -> int:
    """Return the number of workers; 0 means one per CPU core of this process."""
    return setting or len(os.sched_getaffinity(0))


def encode_in_order(
    encoder: Encoder | AlignedEncoder, batches: Iterator[list], workers: int
) -> Iterator[list[EncodedRow | BadRow]]:
    """Yield the results of batches of (place, row) pairs, in order. Raises as the encoder does."""
    first = list(itertools.islice(batches, MIN_BATCHES))
    if workers == 1 or len(first) < MIN_BATCHES:
        yield from map(encoder, itertools.chain(first, batches))
        return
    pool = ProcessPoolExecutor(
        workers,
        # Forked workers have the tokenizer at once and import nothing of ours again.
        mp_context=Workers(),
        initializer=_start_worker,
        initargs=(encoder, os.getpid()),
    )
    pending: deque = deque()
    try:
        for batch in itertools.chain(first, batches):
            pending.append(pool.submit(_encode, batch))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(encoder: Encoder | AlignedEncoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a broken pool ends its workers by signal
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    """End this process once its parent is gone: a killed parent cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _encode(batch: list) -> list[EncodedRow | BadRow]:
    return _encoder(batch)
