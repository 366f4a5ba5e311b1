"""TensorBoard: one folder across restarts, every step once, and an overview page of charts."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from kd.losses.metrics import chart_layout
from kd.training.checkpoints.checkpoint import step_of

# The settings of Transformers by which runs are compared; it has a hundred others.
TRAINING_KEYS = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "num_train_epochs",
    "max_steps",
    "seed",
    "precision",
    "gradient_checkpointing",
]


def open_writer(trainer: Trainer, folder: str, checkpoint: str | None) -> None:
    """Write to `folder` and hide what earlier starts logged after `checkpoint`.

    Those steps are repeated now; without this they would show twice.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and trainer.is_world_process_zero():
            first_step = step_of(Path(checkpoint)) + 1 if checkpoint else 1
            callback.logging_dir = folder  # for what is logged after the training, too
            callback.tb_writer = SummaryWriter(folder, purge_step=first_step)
            callback.tb_writer.add_custom_scalars(
                {
                    page: {title: ["Multiline", tags] for title, tags in charts.items()}
                    for page, charts in chart_layout().items()
                }
            )


def write_hparams(folder: str, recipe: dict[str, Any]) -> None:
    """Add the finished run to the page that compares runs: its settings beside its curves' ends.

    At first, TensorBoard shows five settings (those that differ between runs, then the others in
    alphabetical order) and five curves, held-out ones first.
    """
    settings = {
        key: value
        for key, value in recipe.items()
        if (key in TRAINING_KEYS or key not in TrainingArguments.__dataclass_fields__)
        and isinstance(value, bool | int | float | str)
        and len(str(value)) < 100  # a list of data sources is no column
    }
    # `hparams` also declares the columns of an experiment. TensorBoard takes such columns from one
    # run and does not look for differences, so they are left out and it finds them in all runs.
    _, *session = hparams(settings, {})
    with SummaryWriter(folder) as writer:
        for summary in session:
            writer._get_file_writer().add_summary(summary)
