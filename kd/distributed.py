"""Ranks of a job: who this process is, what the ranks share, and output from rank 0 alone.

Every function works without a process group, as the only rank. Functions marked "Collective" must
be called by all ranks. Settings are checked before torch is imported, which takes seconds; so this
file imports torch only inside the functions that need it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """The rank of this process; without a process group, the rank that the launcher assigned."""
    if is_initialized():
        import torch.distributed as dist

        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of ranks; before a process group exists, the number that the launcher started."""
    if is_initialized():
        import torch.distributed as dist

        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The rank of this process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_initialized() -> bool:
    """Whether this process has a process group."""
    if "torch.distributed" not in sys.modules:
        return False  # nobody can have made one
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_prefix() -> str:
    """The prefix "[rank N] " if there are several ranks, else an empty string."""
    return f"[rank {rank()}] " if world_size() > 1 else ""


def print_rank0(text: object) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(text, flush=True)


def start_gloo() -> None:
    """Start a process group for CPU tensors, where the launcher started several processes.

    The timeout is long because one rank may wait hours for another rank's last batch.
    """
    if world_size() > 1 and not is_initialized():
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(days=7))


def default_dtype() -> str:
    """float32 on a CPU, bfloat16 on a GPU, and float16 on a GPU that lacks bfloat16, such as T4."""
    import torch

    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def barrier() -> None:
    """Collective: wait for all ranks."""
    if is_initialized():
        import torch.distributed as dist

        dist.barrier()


def share_of(items: list[T]) -> list[T]:
    """The items that this rank processes: every `world_size`-th, starting at its rank."""
    return items[rank() :: world_size()]


def all_gather(value: T) -> list[T]:
    """Collective: every rank's value, in the order of the ranks. Values are pickled."""
    if not is_initialized():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Collective: rank 0's value, on every rank. The value is pickled."""
    if not is_initialized():
        return value
    import torch.distributed as dist

    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def all_sum(values: Tensor) -> Tensor:
    """Collective: the sum over all ranks, in a new tensor of the same shape."""
    values = values.clone()
    if is_initialized():
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """Collective: the element-wise maximum over all ranks, in a new tensor of the same shape."""
    values = values.clone()
    if is_initialized():
        import torch.distributed as dist

        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Collective: raise a ValueError or OSError of one rank as ValueError on all ranks.

    Without it the other ranks would wait for the failed one forever.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    for number, text in enumerate(all_gather(error and str(error))):
        if text:
            raise ValueError(text if number == 0 else f"{text} (rank {number})") from error
