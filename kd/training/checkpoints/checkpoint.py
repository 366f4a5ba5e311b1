"""Checkpoints that are complete or absent: written under a temporary name, sealed, then renamed.

Names in an output_dir:

- checkpoint-8: complete.
- saving-checkpoint-8: being written, or left by a run that was killed while it wrote.
- torn-checkpoint-8: found damaged later; kept for its owner to inspect.
- old-checkpoint-8: being deleted.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ExportableState

from kd.distributed import barrier, broadcast, print_rank0, rank
from kd.run.atomic import sync_file
from kd.training.checkpoints.manifest import damage, read_manifest, seal, size_of

NAME, SAVING, TORN, OLD = "checkpoint-", "saving-", "torn-", "old-"
BYTES_PER_TRAINED_WEIGHT = 16  # saved weight, float32 copy, two moments
SPARE = 1.2  # free space required, as a multiple of the checkpoint's size


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-STEP, newest first."""
    found = [path for path in output_dir.glob(f"{NAME}*") if path.name[len(NAME) :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint."""
    return int(checkpoint.name[len(NAME) :])


def usable_checkpoint(output_dir: str) -> tuple[str, dict[str, Any]] | None:
    """Collective: (folder, run identity) of the newest undamaged checkpoint; None without one.

    Removes what a killed run left half-written. Renames damaged checkpoints and reports them.
    """
    folder = Path(output_dir)
    if rank() == 0:
        for left in [*folder.glob(f"{SAVING}{NAME}*"), *folder.glob(f"{OLD}{NAME}*")]:
            shutil.rmtree(left, ignore_errors=True)
    for checkpoint in broadcast(checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            content = broadcast(read_manifest(checkpoint))
            return str(checkpoint), content["about"]
        torn = checkpoint.with_name(f"{TORN}{checkpoint.name}")
        if rank() == 0:
            shutil.rmtree(torn, ignore_errors=True)
            checkpoint.rename(torn)
        print_rank0(f"{checkpoint}: {problem}; set aside as {torn.name}")
    return None


def write_checkpoint(trainer: Trainer, run_identity: dict[str, Any]) -> None:
    """Collective: write the whole training state as output_dir/checkpoint-STEP.

    Raises ValueError if the disk has too little space.
    """
    final = Path(trainer.args.output_dir) / f"{NAME}{trainer.state.global_step}"
    if broadcast(final.exists()):
        return  # this step has been saved
    temporary = final.with_name(f"{SAVING}{final.name}")
    problem = None
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        problem = lack_of_space(final.parent, estimated_size(trainer))
    problem = broadcast(problem)
    if problem:
        raise ValueError(problem)
    with explain_full_disk(temporary):
        write_training_state(trainer, temporary, final)
        seal(temporary, run_identity)
    if rank() == 0:
        open_to_umask([temporary, *temporary.rglob("*")])
        temporary.rename(final)
        sync_file(final.parent)
    barrier()
    if rank() == 0:
        limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
        delete_old(final.parent, limit, best)


def write_training_state(trainer: Trainer, folder: Path, final: Path) -> None:
    """Write to `folder` what Transformers' _save_checkpoint writes; it offers no choice of folder.

    `final` is the folder's name after the rename.
    """
    args, state = trainer.args, trainer.state
    trainer.store_flos()
    trainer.save_model(str(folder), _internal_call=True)
    if state.best_global_step:
        best = final.with_name(f"{NAME}{state.best_global_step}")
        if best == final or best.exists():
            state.best_model_checkpoint = str(best)
    if not args.save_only_model:
        trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))
    if args.should_save:
        state.stateful_callbacks = {
            type(part).__name__: part.state()
            for part in [*trainer.callback_handler.callbacks, trainer.control]
            if isinstance(part, ExportableState)
        }
        state.save_to_json(str(folder / "trainer_state.json"))


def estimated_size(trainer: Trainer) -> int:
    """Bytes of the next checkpoint: the size of the last one, or an estimate for the first."""
    newest = next(iter(checkpoints(Path(trainer.args.output_dir))), None)
    if newest:
        return size_of(newest)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is empty between two uses; ds_numel is its full size.
    return BYTES_PER_TRAINED_WEIGHT * sum(getattr(p, "ds_numel", p.numel()) for p in trained)


def lack_of_space(output_dir: Path, size: int) -> str | None:
    """An error message if a checkpoint of `size` bytes would fill the disk, else None."""
    output_dir.mkdir(parents=True, exist_ok=True)
    free, required = shutil.disk_usage(output_dir).free, int(size * SPARE)
    if free >= required:
        return None
    return (
        f"no space for a checkpoint: {free / 1e6:,.0f} MB free in {output_dir}, wanted "
        f"{required / 1e6:,.0f} MB. Nothing was written; the last good checkpoint is "
        f"{newest_name(output_dir)}. Free some space, or choose an output_dir with more, then run "
        "the same command again"
    )


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Remove a checkpoint that filled the disk, and raise ValueError with the free space.

    On a full disk torch.save raises an error that does not mention space.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(folder.parent).free
        if not full and free > 1 << 20:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(
            f"the disk of {folder.parent} is full: a checkpoint could not be written "
            f"({free / 1e6:,.0f} MB free, {error}) and was removed; the last good checkpoint is "
            f"{newest_name(folder.parent)}. Free some space, then run the same command again"
        ) from error


def newest_name(output_dir: Path) -> str:
    """The name of the newest checkpoint, or "none"."""
    return next((path.name for path in checkpoints(output_dir)), "none")


def delete_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the `limit` newest complete checkpoints and the best one; None keeps all."""
    complete = [path for path in checkpoints(output_dir) if read_manifest(path)]
    for path in complete[limit:] if limit else []:
        if best is None or Path(best).name != path.name:
            old = path.rename(path.with_name(f"{OLD}{path.name}"))  # never half a checkpoint-N
            shutil.rmtree(old, ignore_errors=True)  # the next start removes any remains


def open_to_umask(paths: Iterable[Path]) -> None:
    """Give files the modes that the umask allows; safetensors restricts them to their owner."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
