"""Remedies for a run that is out of memory: only changes that it has not made yet."""

import contextlib
from collections.abc import Iterator

import torch

from kd.settings.distillation import SMALLEST_WORKSPACE
from kd.settings.training_recipe import Recipe


@contextlib.contextmanager
def explain_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """Raise an allocator's error again as a ValueError that lists remedies, cheapest first."""
    try:
        yield
    except RuntimeError as error:
        on_device = isinstance(error, torch.OutOfMemoryError)
        if not on_device and "can't allocate memory" not in str(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"out of memory on {recipe.training.device}: {first}\n"
            "Changes that save memory, cheapest first:\n"
            + "\n".join(f"  {change}" for change in remedies(recipe))
        ) from error


def remedies(recipe: Recipe) -> list[str]:
    """The changes that save memory in this run, cheapest first."""
    training, model, teacher = recipe.training, recipe.model, recipe.live_teacher
    micro, found = training.per_device_train_batch_size, []
    if micro > 1:
        found.append(
            f"--max_per_device_train_batch_size {micro // 2} (now {micro}): same result, slower"
        )
    if not training.gradient_checkpointing:
        found.append(
            "--gradient_checkpointing true: far less memory for activations, about a third slower"
        )
    workspace = recipe.objective.workspace_bytes // 2**20
    if recipe.teacher and workspace > SMALLEST_WORKSPACE:
        found.append(f"--loss_workspace_mb {SMALLEST_WORKSPACE} (now {workspace}): smaller tiles")
    if teacher and teacher.sharding and teacher.workspace_bytes:
        found.append(
            f"--teacher_workspace_mb 0 (now {teacher.workspace_bytes // 2**20}): the teacher "
            "processes one micro-batch at a time"
        )
    if separate := recipe.separate_teacher:
        if not separate.sharding and training.world_size > 1:
            found.append(
                "--teacher_deepspeed ds_configs/teacher_zero3.json: shard the teacher over all GPUs"
            )
        elif separate.sharding and "offload" not in separate.sharding:
            found.append(
                "--teacher_deepspeed ds_configs/teacher_zero3_offload.json: keep the teacher's "
                "shards in host memory"
            )
    if not model.lora_rank:
        found.append("lora_rank: 16: train adapters instead of every weight (another result)")
    elif model.quantization == "none":
        found.append("quantization: nf4: keep the frozen base in 4 bits (another result)")
    found.append(f"max_length: less than {recipe.data.max_length}: cut long rows (another result)")
    return found
