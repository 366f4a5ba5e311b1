"""Where a run starts: from a checkpoint of the same run, from step 0, or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.distributed import print_rank0, rank
from kd.run.atomic import remove
from kd.run.finished import changed_settings, finished_before, is_done
from kd.run.folder_lock import LOCK
from kd.run.run_record import recorded_settings
from kd.run.signals import STOPPED
from kd.settings.training_recipe import Recipe
from kd.training.checkpoints.checkpoint import usable_checkpoint
from kd.training.checkpoints.recut import recut
from kd.training.checkpoints.same_run import (
    FREE,
    PLANNED,
    check_same_rows,
    check_same_run,
    identify_run,
)
from kd.training.longer_run import LENGTH, is_longer


@dataclass
class ResumePoint:
    """The checkpoint to resume from, and the identity that new checkpoints record."""

    identity: dict[str, Any]  # recipe, number of processes, ZeRO stage, rows
    checkpoint: str | None
    longer: bool = False  # the checkpoint is the end of a shorter run

    def add_rows(self, fingerprint: str) -> None:
        """Record the rows of this run; raise ValueError if the checkpoint has seen others."""
        self.identity["rows"] = fingerprint
        if self.checkpoint:
            check_same_rows(self.checkpoint, fingerprint)


def is_finished(recipe: Recipe) -> bool:
    """Whether output_dir holds this run, finished; tells so.

    A run that has only become longer is not finished, and a `--check` always starts again. Raises
    ValueError if the folder holds a finished run with other settings.
    """
    folder = recipe.training.output_dir
    if recipe.training.check:
        if rank() == 0:
            clear(Path(folder))
        return False
    found, wanted = recorded_settings(folder), recipe.to_dict()
    if is_done(folder) and is_longer(wanted, Path(folder)):
        changes = changed_settings(found, wanted, FREE | PLANNED)
        if changes and changes.keys() <= LENGTH:
            return False
    return finished_before(folder, found, wanted, FREE | PLANNED)


def clear(folder: Path) -> None:
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.name != LOCK:
            remove(path)


def find_resume_point(recipe: Recipe) -> ResumePoint:
    """Collective: find the newest whole checkpoint in output_dir.

    Raises ValueError if that checkpoint belongs to a run with other settings, and if there is none
    for a finished run to go on from.
    """
    training = recipe.training
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = plugin.hf_ds_config.get_value("zero_optimization.stage") if plugin else None
    identity = identify_run(training, recipe.to_dict(), stage)
    longer = is_done(training.output_dir)  # otherwise `is_finished` has ended the script
    found = usable_checkpoint(training.output_dir)
    if rank() == 0:
        (Path(training.output_dir) / STOPPED).unlink(missing_ok=True)
    if not found:
        if longer:
            raise ValueError(
                f"output_dir: the run in {training.output_dir} is finished, and it has no "
                "checkpoint from which a longer one could go on; its saved model lacks the state "
                "of the optimizer. Train in a new output_dir, or start there from this model"
            )
        return ResumePoint(identity, None)
    checkpoint, earlier = found
    check_same_run(checkpoint, earlier, identity)
    print_rank0(f"resuming from {checkpoint}")
    then, now = earlier["processes"], identity["processes"]
    if then != now:
        print_rank0(
            f"the run goes on with {now} process{'es' if now > 1 else ''} instead of {then}"
        )
        if stage:
            checkpoint = str(recut(Path(checkpoint), then, plugin.hf_ds_config.config))
    return ResumePoint(identity, checkpoint, is_longer(identity["recipe"], Path(checkpoint)))
