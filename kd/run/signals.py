"""Stop a run on a signal: all ranks finish the step, save a checkpoint, and exit together.

SLURM, Kubernetes and torchrun send SIGTERM or SIGUSR1 before they kill a job; Ctrl-C sends SIGINT.
The signal may reach one rank or all, once or twice, so the handler only records it. A second Ctrl-C
ends the run at once: here in a process without a launcher, and otherwise in launch/start.py.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from transformers import TrainerCallback, TrainerControl

from kd.distributed import rank
from kd.run.outcome import Stopped, report_outcome

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED = "stopped.json"


class StopsOnSignal(TrainerCallback):
    """Save a checkpoint and end the training after the step in which any rank received a signal."""

    def __init__(self) -> None:
        self.received = 0  # the signal that this rank received
        self.agreed = 0  # the signal that any rank received, known to all ranks
        self.earlier: dict[int, Callable | int | None] = {}

    def on_train_begin(self, args, state, control, **_) -> None:
        """Install the handler.

        Not earlier: while models load there is nothing to save, and an immediate exit is right.
        """
        self.earlier = {number: signal.signal(number, self.record) for number in SIGNALS}

    def record(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal by recording its number.

        Raises KeyboardInterrupt on a second Ctrl-C in a process without a launcher.
        """
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            if self.received == number:
                raise KeyboardInterrupt
            # print is not allowed in a handler: it may have interrupted another print
            os.write(2, b"SIGINT: saving after this step; Ctrl-C again ends at once\n")
        self.received = number

    def end_step(self, number: int, control: TrainerControl) -> None:
        """Stop the training if `number`, the signal of any rank, is not 0."""
        self.agreed = number
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_) -> None:
        """Report that a checkpoint exists."""
        if state.is_world_process_zero:
            report_outcome("saved", state.global_step)

    def on_train_end(self, args, state, control, **_) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def raise_if_stopped(self, output_dir: str, step: int, last: int) -> None:
        """Raise Stopped if a signal ended the training before its last step."""
        if not self.agreed or step >= last:
            return
        stopped = Stopped(step, last, self.agreed)
        if rank() == 0:
            text = json.dumps({"step": step, "of": last, "message": str(stopped)}, indent=2)
            (Path(output_dir) / STOPPED).write_text(text + "\n")
        raise stopped
