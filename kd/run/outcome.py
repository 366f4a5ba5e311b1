"""How a run ended: the exception of a stopped run, and the outcome that a job script acts on.

It is imported before a script has parsed its settings, so it must not import Transformers.
"""

import os
import signal
from pathlib import Path

OUTCOME = "KD_OUTCOME"  # the variable with the file that launch/slurm/train.sbatch reads


class Stopped(Exception):
    """A run was stopped by a signal before its last step; its state is saved."""

    def __init__(self, step: int, last: int, number: int):
        self.step, self.number = step, number
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after step {step} of {last}; run the same command again to resume"
        )


def report_outcome(outcome: str, progress: int | None = None) -> None:
    """Write the outcome (saved, stopped, failed or done) for the job script to act on.

    `progress` is what would not be lost: optimizer steps or answers. The job script gives up if it
    does not grow.
    """
    if os.environ.get(OUTCOME):
        text = outcome if progress is None else f"{outcome} {progress}"
        Path(os.environ[OUTCOME]).write_text(text + "\n")
