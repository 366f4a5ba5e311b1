"""Rates of a device: matrix products, memory, and the link to the other processes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """What a device can do, by its vendor or as measured."""

    tflops: float  # matrix products in the precision of the run, 1e12 operations/s
    memory_gb_s: float  # memory reads and writes together, 1e9 bytes/s
    link_gb_s: float  # what a process sends to the others, 1e9 bytes/s
    efficiency: float = 0.5  # share of the matrix rate that a training step reaches


def measure_rates(device: str, dtype: torch.dtype, link_gb_s: float, efficiency: float) -> Rates:
    """Measure the matrix rate and the memory rate of the present device."""
    numbers = 2**28 if device == "cuda" else 2**25
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    seconds = best_time(lambda: target.copy_(source), device)
    moved = 2 * source.numel() * source.element_size()
    tflops = matrix_rate(device, dtype) / 1e12
    return Rates(tflops, moved / seconds / 1e9, link_gb_s, efficiency)


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
