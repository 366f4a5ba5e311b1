"""Resume on another number of ranks: cut the optimizer state of a ZeRO checkpoint into other parts.

Under ZeRO-1 and ZeRO-2 every rank saves its part of one flat tensor for each parameter group: the
float32 weights and the optimizer's moments. The parts follow each other, and the last one is
padded. A new rank reads only the old parts that overlap its own.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.distributed import barrier, raise_on_all_ranks, rank, world_size

RECUT = "recut-"
MODEL = "mp_rank_00_model_states.pt"
PART = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
ALIGNMENT = 2  # numbers; DeepSpeed pads a group to a multiple of this times the ranks


def recut(checkpoint: Path, ranks: int, config: dict[str, Any]) -> Path:
    """Collective: write `checkpoint`, saved by `ranks` ranks, for the present ones.

    `config` is the present DeepSpeed configuration. Returns the folder of the copy, which has
    everything but links to the files that do not change. Raises ValueError for optimizers whose
    state cannot be cut at any number, and if the order of the parameters depends on the ranks.
    """
    copy = checkpoint.with_name(f"{RECUT}{checkpoint.name}")
    if rank() == 0:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
    barrier()
    (step,) = (path.name for path in checkpoint.glob("global_step*") if path.is_dir())
    with raise_on_all_ranks():
        if rank() == 0:
            link_all(checkpoint, copy)
            (copy / step).mkdir(exist_ok=True)
            model = load(checkpoint / step / MODEL)
            torch.save(model | {"dp_world_size": world_size()}, copy / step / MODEL)
    barrier()
    with raise_on_all_ranks():
        parts = [load(checkpoint / step / PART.format(i)) for i in range(ranks)]
        check_order(parts[0]["ds_config"], config)
        torch.save(own_part(parts), copy / step / PART.format(rank()))
    barrier()
    return copy


def link_all(source: Path, target: Path) -> None:
    """Link the files of a folder, but not those of its subfolders, into another one."""
    for path in source.iterdir():
        if path.is_file():
            try:
                os.link(path, target / path.name)
            except OSError:  # a file system without links
                shutil.copy2(path, target / path.name)


def load(file: Path) -> dict[str, Any]:
    """Load a file of DeepSpeed; its tensors are read from the disk when they are used."""
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def check_order(*configs: dict[str, Any]) -> None:
    """Raise ValueError if DeepSpeed would flatten the parameters in another order on other ranks.

    The state of each parameter would silently become that of another one.
    """
    if any(config["zero_optimization"].get("round_robin_gradients") for config in configs):
        raise ValueError(
            "round_robin_gradients: true in the student's DeepSpeed configuration orders the "
            "parameters by the number of processes; go on with the number of processes of the "
            "checkpoint"
        )


def own_part(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The state that this rank would have saved, from the states of all earlier ranks."""
    states = [part["optimizer_state_dict"] for part in parts]
    groups = range(len(states[0]["single_partition_of_fp32_groups"]))
    bases = [state["base_optimizer_state"] for state in states]
    weights, moments, paddings = [], {}, []
    for group in groups:
        old = [state["single_partition_of_fp32_groups"][group] for state in states]
        total = sum(part.numel() for part in old)
        size = -(-total // (ALIGNMENT * world_size())) * ALIGNMENT
        start = rank() * size
        count = max(0, min(size, total - start))
        weights.append(piece(old, start, count))
        paddings.append(size - count)
        moments[group] = {
            key: recut_state(key, [base["state"][group][key] for base in bases], old, start, size)
            for key in bases[0]["state"].get(group, {})
        }
    new = states[0] | {
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": bases[0] | {"state": moments},
        "group_paddings": paddings,
        "partition_count": [world_size()] * len(groups),
        "param_slice_mappings": [],
    }
    return parts[0] | {"optimizer_state_dict": new}


def recut_state(key: str, values: list, weights: list[Tensor], start: int, size: int) -> Any:
    """One entry of the optimizer's state, for the `size` numbers from `start` on: (size,).

    `values` are those of the earlier ranks, `weights` their parts of the float32 weights. Raises
    ValueError for a tensor with other numbers than one for each weight.
    """
    if not torch.is_tensor(values[0]) or values[0].dim() == 0:
        return values[0]
    if any(value.numel() < part.numel() for value, part in zip(values, weights, strict=True)):
        raise ValueError(
            f"the optimizer's {key} is stored in blocks, which cannot be cut for another number of "
            "processes; go on with the number of processes of the checkpoint"
        )
    unpadded = [value[: part.numel()] for value, part in zip(values, weights, strict=True)]
    total = sum(part.numel() for part in weights)
    own = piece(unpadded, start, max(0, min(size, total - start)))
    return torch.nn.functional.pad(own, (0, size - own.numel()))


def piece(parts: list[Tensor], start: int, count: int) -> Tensor:
    """`count` numbers from `start` on of the concatenated parts, each of shape (n,)."""
    found, first = [], 0
    for part in parts:
        left, right = max(start - first, 0), min(start + count - first, part.numel())
        if left < right:
            found.append(part[left:right])
        first += part.numel()
    return torch.cat(found) if found else parts[0][:0].clone()


def remove_recut(output_dir: Path) -> None:
    """Remove what `recut` wrote into a folder of checkpoints."""
    for folder in output_dir.glob(f"{RECUT}*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
