"""TensorBoard: one folder over restarts, every step once, and a page that a person reads first."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from kd.training.checkpoints.checkpoint import step_of
from kd.training.step_times import PHASES

LAYOUT = {
    "Read this first": {
        "loss and its two terms": ["train/loss", "train/divergence", "train/cross_entropy"],
        "held out": ["eval/loss", "eval/divergence", "eval/cross_entropy"],
        "agreement with the teacher (top-1)": ["train/top1_agreement", "eval/top1_agreement"],
        "entropy of student and teacher": ["train/student_entropy", "train/teacher_entropy"],
        "the teacher's probability of the label": ["train/teacher_label_probability"],
        "on its own answers": [
            "train/on_policy_divergence",
            "train/on_policy_teacher_cross_entropy",
        ],
        "length of its own answers": ["train/generated_length"],
        "gradient norm": ["train/grad_norm"],
    },
    "Speed": {
        "seconds of a step": [f"train/seconds_{phase}" for phase in ("step", *PHASES)],
        "target tokens a second": ["train/target_tokens_per_second"],
        "share of the matrix peak": ["train/matrix_peak_share"],
        "memory of the fullest process (GiB)": ["train/memory_gib"],
        "share of padding": ["train/padding_share"],
    },
}
# Of Transformers' own hundred settings, those that runs are compared by.
TRAINING = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "num_train_epochs",
    "max_steps",
    "seed",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "output_dir",
]


def write_no_step_twice(trainer: Trainer, folder: str, checkpoint: str | None) -> None:
    """Hide what earlier starts wrote of the steps after `checkpoint`, which are now done again."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and trainer.is_world_process_zero():
            begin = step_of(Path(checkpoint)) + 1 if checkpoint else 1
            callback.logging_dir = folder  # for what is logged after the training, too
            callback.tb_writer = SummaryWriter(folder, purge_step=begin)
            callback.tb_writer.add_custom_scalars(
                {
                    page: {title: ["Multiline", tags] for title, tags in charts.items()}
                    for page, charts in LAYOUT.items()
                }
            )


def write_hparams(folder: str, recipe: dict[str, Any], metrics: dict[str, float]) -> None:
    """Put the finished run on the page that compares runs: its settings, its final figures.

    The figures are named by their curves' tags, and no curve is written anew.
    """
    settings = {
        key: value
        for key, value in recipe.items()
        if (key in TRAINING or key not in TrainingArguments.__dataclass_fields__)
        and isinstance(value, bool | int | float | str)
        and len(str(value)) < 100  # the data's sources are no column
    }
    figures = {
        f"eval/{name.removeprefix('eval_')}": value
        for name, value in metrics.items()
        if name.startswith("eval_")
    } or {"train/loss": metrics["train_loss"]}
    with SummaryWriter(folder) as writer:
        for summary in hparams(settings, figures):
            writer._get_file_writer().add_summary(summary)
