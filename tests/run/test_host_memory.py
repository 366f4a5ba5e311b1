"""Freed memory goes back to the system, and mapped files do not count."""

import platform

import pytest
from processes import succeed

from kd.run import host_memory

MIB = 2**20
FRAGMENT = """
import sys
from kd.run.host_memory import return_freed_memory, used_bytes

def main():
    del [bytearray(31 * 2**20)][0]  # raises glibc's own threshold
    before, large, small = used_bytes(), [], []
    for _ in range(20):
        large.append(bytearray(b"x" * (8 * 2**20)))
        small.append(bytearray(b"x" * 50_000))
    del large
    print((used_bytes() - before) // 2**20)

if sys.argv[1] == "returned":
    return_freed_memory()
main()
"""

# Prints by how many MiB the peak grows while a file is read through a mapping, and then by an array
# that is freed before anybody asks.
PEAK = """
import mmap, sys, time
import numpy as np
from kd.run.host_memory import INTERVAL_S, PeakMemory, used_bytes

start, peak = used_bytes(), PeakMemory()
with open(sys.argv[1], "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as file:
    assert sum(file[:: mmap.PAGESIZE]) == 0  # reads every page
    print((peak.read() - start) // 2**20)
array, seen = np.ones(48 * 2**20, np.uint8), peak.samples
while peak.samples < seen + 2:  # the thread sees it without a call of `read`
    time.sleep(INTERVAL_S)
del array
print((peak.read() - start) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_returned_to_the_system():
    """Large blocks between small ones, as in a training step; by default most are kept."""
    kept = {how: int(succeed("python", "-c", FRAGMENT, how)) for how in ("returned", "plain")}
    assert kept["returned"] <= 8 and kept["plain"] >= 24, kept


def test_large_models_on_a_cpu_ask_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(host_memory, "return_freed_memory", lambda: asked.append(1))
    for device, mib in (("cpu", 31), ("cuda", 32), ("cpu", 32)):
        assert not asked
        host_memory.keep_memory_flat(device, mib * MIB)
    assert asked


def test_the_peak_counts_memory_that_was_freed_and_no_mapped_file(tmp_path):
    """In a process of its own: the tests around it leave memory that comes and goes."""
    (tmp_path / "mapped").write_bytes(bytes(64 * MIB))
    mapped, freed = map(int, succeed("python", "-c", PEAK, tmp_path / "mapped").split())
    assert mapped < 16 and 40 < freed < 64
