"""Disk space of a run: downloaded models, checkpoints and the trained model, in bytes."""

import torch

from kd.planning.blueprint import build
from kd.planning.layout import Layout, size_line
from kd.planning.model_sizes import config_of, student_tensors, teacher_tensors
from kd.planning.model_states import state_bytes


def disk_bytes(layout: Layout, checkpoints: int) -> dict[str, float]:
    """What the hub's cache and the output_dir hold at the end; `checkpoints` are kept."""
    checkpoint, saved = checkpoint_bytes(layout)
    model = build(config_of(layout.student), torch.bfloat16)
    downloaded = sum(parameter.numel() for parameter in model.parameters())
    parts = {"student from the hub": 2 * downloaded}
    if layout.teacher:
        parts["teacher from the hub"] = sum(tensor.bytes for tensor in teacher_tensors(layout))
    parts[f"{checkpoints} checkpoints"] = checkpoints * checkpoint
    return parts | {"the trained model": saved}


def checkpoint_bytes(layout: Layout) -> tuple[float, float]:
    """Bytes of a checkpoint, and of the trained model in it."""
    tensors = student_tensors(layout)
    trained = sum(tensor.numel for tensor in tensors if tensor.trained)
    saved = sum(tensor.bytes for tensor in tensors if tensor.trained)
    optimizer = (4 + state_bytes(layout.optimizer)) * trained
    # DeepSpeed saves the module's trained weights in addition to its optimizer shards.
    module = saved if layout.stage else 0.0
    return saved + optimizer + module, saved


def describe_disk(parts: dict[str, float]) -> str:
    """The table that train/plan.py prints; sizes are in bytes."""
    lines = ["disk space", *(size_line(name, size) for name, size in parts.items())]
    return "\n".join([*lines, size_line("total", sum(parts.values()))])
