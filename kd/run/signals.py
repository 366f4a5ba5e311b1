"""A signal ends a run at the end of a step: all ranks agree, save, and leave together.

SIGTERM and SIGUSR1 are what SLURM, Kubernetes and torchrun send before they kill. They come to one
rank or to all, once or twice, so a handler only notes them.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM and torchrun send to all of a job
STOPPED = "stopped.json"
OUTCOME = "KD_OUTCOME"  # names a file for one word, which launch/slurm/train.sbatch reads


class Stopped(Exception):
    """A run that ended before its last step because it was asked to, with all that it did saved."""

    def __init__(self, step: int, last: int, number: int):
        self.step, self.number = step, number
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after step {step} of {last}; the same command goes on from there"
        )


class StopsOnSignal(TrainerCallback):
    """Saves and ends the training after the step in which any rank had a signal."""

    def __init__(self) -> None:
        self.received = self.agreed = 0
        self.earlier: dict[int, Callable | int | None] = {}

    def on_train_begin(self, args, state, control, **_) -> None:
        # Not earlier: while models load nothing can be saved, and dying at once is right.
        self.earlier = {number: signal.signal(number, self.note) for number in SIGNALS}

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def end_step(self, number: int, control: TrainerControl) -> None:
        """`number` is the signal of any rank, 0 without one."""
        self.agreed = number
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_) -> None:
        if state.is_world_process_zero:
            report_outcome("saved")

    def on_train_end(self, args, state, control, **_) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def leave(self, output_dir: str, step: int, last: int) -> None:
        """Raise Stopped where a signal ended the training before its last step."""
        if not self.agreed or step >= last:
            return
        stopped = Stopped(step, last, self.agreed)
        if not dist.is_initialized() or dist.get_rank() == 0:
            text = json.dumps({"step": step, "of": last, "message": str(stopped)}, indent=2)
            (Path(output_dir) / STOPPED).write_text(text + "\n")
        raise stopped


def report_outcome(outcome: str) -> None:
    """saved, stopped, failed or done: what the caller of a script can make its decision by."""
    if os.environ.get(OUTCOME):
        Path(os.environ[OUTCOME]).write_text(outcome + "\n")
