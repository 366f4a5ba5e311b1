"""Where a run starts: from a checkpoint of the same run, from step 0, or not at all."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.distributed import print_rank0, rank
from kd.run.exit import is_done
from kd.run.signals import STOPPED
from kd.settings.training_recipe import Recipe
from kd.training.checkpoints.checkpoint import usable_checkpoint
from kd.training.checkpoints.same_run import check_same_rows, check_same_run, identify_run


@dataclass
class ResumePoint:
    """The checkpoint to resume from, and the identity that new checkpoints record."""

    identity: dict[str, Any]  # recipe, number of processes, ZeRO stage, rows
    checkpoint: str | None

    def add_rows(self, fingerprint: str) -> None:
        """Record the rows of this run; raise ValueError if the checkpoint has seen others."""
        self.identity["rows"] = fingerprint
        if self.checkpoint:
            check_same_rows(self.checkpoint, fingerprint)


def is_finished(recipe: Recipe) -> bool:
    """Whether output_dir holds a finished run. A `--check` always starts again."""
    folder = recipe.training.output_dir
    if recipe.training.check and rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if not is_done(folder):
        return False
    print_rank0(f"{folder} is finished already; remove it to train again")
    return True


def find_resume_point(recipe: Recipe) -> ResumePoint:
    """Collective: find the newest whole checkpoint in output_dir.

    Raises ValueError if that checkpoint belongs to a run with other settings.
    """
    training = recipe.training
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = plugin.hf_ds_config.get_value("zero_optimization.stage") if plugin else None
    identity = identify_run(training, recipe.to_dict(), stage)
    found = usable_checkpoint(training.output_dir)
    if rank() == 0:
        (Path(training.output_dir) / STOPPED).unlink(missing_ok=True)
    if not found:
        return ResumePoint(identity, None)
    checkpoint, earlier = found
    check_same_run(checkpoint, earlier, identity)
    print_rank0(f"resuming from {checkpoint}")
    return ResumePoint(identity, checkpoint)
