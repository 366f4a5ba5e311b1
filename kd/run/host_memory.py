"""Memory of this process in the machine: return what is freed, and count what is used."""

import ctypes
import os
import platform
import resource
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
THRESHOLD_BYTES = 2**16
LARGE_BYTES = 2**25  # of models whose freed memory is returned
STATUS = Path("/proc/self/status")
KIB = 1024
INTERVAL_S = 0.05  # between two samples; one takes 30 microseconds


def keep_memory_flat(device: str, model_bytes: float) -> None:
    """Return freed memory to the system from now on, if the models are large and on a CPU.

    A training calls it before it loads its models, since what loading frees would stay, too. New
    mappings cost time: a model of 1.3 M parameters would train 1.4 times as long, to save less than
    0.1 GiB.
    """
    if device == "cpu" and model_bytes >= LARGE_BYTES:
        return_freed_memory()


def return_freed_memory() -> None:
    """Make glibc return freed blocks to the system instead of keeping them.

    Tensors on the CPU come from malloc. By default glibc raises the size from which a block has a
    mapping of its own, up to 32 MiB, with every large block that is freed. Smaller blocks then
    share heaps that fill with holes and grow from step to step. The variable MALLOC_MMAP_THRESHOLD_
    has precedence. Limiting the number of heaps (MALLOC_ARENA_MAX) changed nothing beyond this.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)


def used_bytes() -> int:
    """Memory that this process alone makes the machine hold: anonymous and shared pages.

    Pages of mapped files, such as weights and libraries, do not count: the system drops them when
    it needs their memory. Without Linux's /proc, all resident pages count.
    """
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem")) * KIB


class PeakMemory:
    """The largest `used_bytes` since it was made, sampled by a thread of its own."""

    def __init__(self) -> None:
        self.most, self.samples = used_bytes(), 0
        threading.Thread(target=watch, args=(weakref.ref(self),), daemon=True).start()

    def read(self) -> int:
        """Return the peak in bytes."""
        self.most = max(self.most, used_bytes())
        self.samples += 1
        return self.most


def watch(reference: Callable[[], PeakMemory | None]) -> None:
    """Sample a peak until nobody holds it any more."""
    while peak := reference():
        peak.read()
        del peak
        time.sleep(INTERVAL_S)
