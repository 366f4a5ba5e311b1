"""What can be changed where a training run does not fit: only what this run has not done yet."""

import contextlib
from collections.abc import Iterator

import torch

from kd.losses.objective import Objective
from kd.settings.distillation import OWN_BASE, ModelSettings, TeacherSettings
from kd.settings.training import TrainingSettings

SMALL_WORKSPACE = 128


@contextlib.contextmanager
def names_what_to_change(
    training: TrainingSettings,
    model: ModelSettings,
    max_length: int,
    teacher: TeacherSettings | None = None,
    objective: Objective | None = None,
) -> Iterator[None]:
    """Turn an allocator's error into a ValueError with the remedies, cheapest first."""
    try:
        yield
    except RuntimeError as error:
        on_device = isinstance(error, torch.OutOfMemoryError)
        if not on_device and "can't allocate memory" not in str(error):
            raise
        changes = remedies(training, model, max_length, teacher, objective)
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"out of memory on {training.device}: {first}\nWhat makes it smaller, cheapest first:\n"
            + "\n".join(f"  {change}" for change in changes)
        ) from error


def remedies(
    training: TrainingSettings,
    model: ModelSettings,
    max_length: int,
    teacher: TeacherSettings | None,
    objective: Objective | None,
) -> list[str]:
    micro, found = training.per_device_train_batch_size, []
    if micro > 1:
        half = micro // 2
        found.append(
            f"--max_per_device_train_batch_size {half} (now {micro}): the same steps, more slowly"
        )
    if not training.gradient_checkpointing:
        found.append("--gradient_checkpointing true: a third more time, far fewer activations")
    if objective and objective.loss_workspace_mb > SMALL_WORKSPACE:
        found.append(
            f"--loss_workspace_mb {SMALL_WORKSPACE} (now {objective.loss_workspace_mb}): smaller tiles"
        )
    if teacher and teacher.teacher_deepspeed and teacher.teacher_workspace_mb:
        found.append(
            f"--teacher_workspace_mb 0 (now {teacher.teacher_workspace_mb}): the teacher over one "
            "micro-batch at a time"
        )
    if teacher and teacher.teacher == OWN_BASE:
        pass  # it takes no memory of its own
    elif teacher and not teacher.teacher_deepspeed and training.world_size > 1:
        found.append("--teacher_deepspeed ds_configs/teacher_zero3.json: the teacher over all GPUs")
    elif teacher and teacher.teacher_deepspeed and "offload" not in teacher.teacher_deepspeed:
        found.append(
            "--teacher_deepspeed ds_configs/teacher_zero3_offload.json: its shards in host memory"
        )
    if not model.lora_rank:
        found.append("lora_rank: 16: adapters are trained in place of every weight (another run)")
    elif model.quantization == "none":
        found.append("quantization: nf4: the frozen base in four bits (another run)")
    found.append(f"max_length: less than {max_length} (another run: long rows are cut)")
    return found
