"""Several processes share a measurement: each takes a part of the batches, all get the sums.

Started by a launch profile or by torchrun; one process alone needs none of this, and no backend.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes() -> None:
    """gloo also beside GPUs: what is exchanged are sums, in the memory of the CPU."""
    if PROCESSES > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))


def own_share(items: list) -> list:
    return items[RANK::PROCESSES]


def total(value: Tensor) -> Tensor:
    """The sum over processes, in place; a number that one process alone holds stays bit-equal."""
    if PROCESSES > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    if PROCESSES > 1:
        dist.barrier()


def device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)
