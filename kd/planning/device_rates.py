"""Rates of a device: matrix products, memory, and the link to the other processes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """What a device can do, by its vendor or as measured."""

    tflops: float  # matrix products in the precision of the run, 1e12 operations/s
    memory_gb_s: float  # memory reads and writes together, 1e9 bytes/s
    link_gb_s: float  # what a process sends to the others of its machine, 1e9 bytes/s
    network_gb_s: float = math.inf  # what it sends to other machines, 1e9 bytes/s
    link_latency_us: float = 0.0  # of a ring's hop to a process of the same machine, 1e-6 s
    network_latency_us: float = 0.0  # of a ring's hop to another machine, 1e-6 s
    efficiency: float = 0.5  # share of the matrix rate that a training step reaches


def measure_rates(device: str, dtype: torch.dtype, **others: float) -> Rates:
    """Measure the matrix rate and the memory rate of the present device; `others` are given."""
    numbers = 2**28 if device == "cuda" else 2**25
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    seconds = best_time(lambda: target.copy_(source), device)
    moved = 2 * source.numel() * source.element_size()
    tflops = matrix_rate(device, dtype) / 1e12
    return Rates(tflops, moved / seconds / 1e9, **others)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Measured operations per second of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_time(lambda: a @ a, device)


def best_time(run: Callable[[], object], device: str) -> float:
    """The shortest of five runs, in seconds."""
    times = []
    for _ in range(6):  # the first one loads libraries
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
