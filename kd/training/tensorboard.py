"""TensorBoard over restarts: one folder, every step once."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from kd.training.saving import step_of


def write_no_step_twice(trainer: Trainer, folder: str, checkpoint: str | None) -> None:
    """Hide what earlier starts wrote of the steps after `checkpoint`, which are now done again."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and trainer.is_world_process_zero():
            begin = step_of(Path(checkpoint)) + 1 if checkpoint else 1
            callback.tb_writer = SummaryWriter(folder, purge_step=begin)
