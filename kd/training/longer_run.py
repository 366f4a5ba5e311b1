"""Go on with a finished run whose `max_steps` or `num_train_epochs` was raised."""

from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from kd.distributed import print_rank0
from kd.run.finished import read_json

LENGTH = {"max_steps", "num_train_epochs"}
STATE = "trainer_state.json"


def read_state(folder: Path) -> dict[str, Any]:
    """Trainer's state in the folder of a run or a checkpoint; {} without one.

    Raises ValueError if the file is damaged.
    """
    return read_json(folder / STATE, "restore the file, or use a new output_dir")


def is_longer(recipe: dict[str, Any], folder: Path) -> bool:
    """Whether a run of `recipe` goes beyond the end of the run in `folder`, which has ended.

    `folder` is that of the run or of its last checkpoint. False if the run did not reach its last
    step, because a signal or early stopping ended it.
    """
    state = read_state(folder)
    if not 0 < state.get("max_steps", 0) <= state.get("global_step", 0):
        return False
    if recipe["max_steps"] > 0:
        return recipe["max_steps"] > state["global_step"]
    return recipe["num_train_epochs"] > state["epoch"]


class LongerRun(TrainerCallback):
    """Set the learning rate to that of the longer run's schedule, and say so.

    The checkpoint holds the rate at which the shorter run ended, often 0. Without this, the first
    step would use it.
    """

    def on_train_begin(self, args, state, control, lr_scheduler=None, **_) -> None:
        """Called once the checkpoint is loaded."""
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # Accelerate wraps it
        if not isinstance(scheduler, LambdaLR):
            return
        groups = scheduler.optimizer.param_groups
        before = groups[0]["lr"]
        parts = zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        for group, base, factor in parts:
            group["lr"] = base * factor(scheduler.last_epoch)
        print_rank0(
            f"the run goes on from step {state.global_step} to step {state.max_steps}: from here "
            f"its learning rate follows the {args.lr_scheduler_type.value} schedule of the whole "
            f"length, {groups[0]['lr']:.3g} in the next step ({before:.3g} at the shorter run's "
            "end)"
        )
