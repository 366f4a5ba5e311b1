"""Checkpoints that are whole or not there: written aside, sealed, renamed; checked before use.

saving-checkpoint-8 is being written (or was, when its run was killed), checkpoint-8 is whole,
torn-checkpoint-8 was found damaged later and is kept out of the way, for its owner to look at.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import ExportableState

from kd.distributed import barrier, broadcast, rank
from kd.training.checkpoints.manifest import damage, read_manifest, seal, size_of

if TYPE_CHECKING:
    from kd.training.trainer import DistillationTrainer

NAME, ASIDE, TORN, OLD = "checkpoint-", "saving-", "torn-", "old-"
BYTES_A_TRAINED_WEIGHT = 16  # saved, float32 copy, two moments
SPARE = 1.2  # free space wanted, in sizes of a checkpoint


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders checkpoint-STEP, newest first."""
    found = [path for path in output_dir.glob(f"{NAME}*") if path.name[len(NAME) :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[len(NAME) :])


def usable_checkpoint(output_dir: str) -> tuple[str, dict[str, Any]] | None:
    """Collective: (folder, what its manifest says) of the newest whole checkpoint.

    What a killed run left half-written is removed; damaged checkpoints are set aside, and said.
    """
    folder = Path(output_dir)
    if rank() == 0:
        for left in [*folder.glob(f"{ASIDE}{NAME}*"), *folder.glob(f"{OLD}{NAME}*")]:
            shutil.rmtree(left, ignore_errors=True)
    for checkpoint in broadcast(checkpoints(folder)):
        wrong = damage(checkpoint)
        if wrong is None:
            content = broadcast(read_manifest(checkpoint))
            return str(checkpoint), content["about"]
        if rank() == 0:
            torn = checkpoint.with_name(f"{TORN}{checkpoint.name}")
            shutil.rmtree(torn, ignore_errors=True)
            checkpoint.rename(torn)
            print(f"{checkpoint}: {wrong}; set aside as {torn.name}", flush=True)
    return None


def write_checkpoint(trainer: "DistillationTrainer") -> None:
    """Collective: the whole state of a training run as output_dir/checkpoint-STEP."""
    final = Path(trainer.args.output_dir) / f"{NAME}{trainer.state.global_step}"
    if broadcast(final.exists()):
        return  # this step has been saved
    aside = final.with_name(f"{ASIDE}{final.name}")
    problem = None
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        problem = lack_of_space(final.parent, estimated_size(trainer))
    problem = broadcast(problem)
    if problem:
        raise ValueError(problem)
    with names_a_full_disk(aside):
        write_parts(trainer, aside, final)
        seal(aside, trainer.about)
    if rank() == 0:
        open_to_umask([aside, *aside.rglob("*")])
        aside.rename(final)
        sync_folder(final.parent)
    barrier()
    if rank() == 0:
        keep = trainer.args.save_total_limit
        delete_old(final.parent, keep, trainer.state.best_model_checkpoint)


def write_parts(trainer: "DistillationTrainer", aside: Path, final: Path) -> None:
    """What Transformers' own _save_checkpoint writes, in a folder of our choice."""
    args, state = trainer.args, trainer.state
    trainer.store_flos()
    trainer.save_model(str(aside), _internal_call=True)
    if state.best_global_step:
        best = final.with_name(f"{NAME}{state.best_global_step}")
        if best == final or best.exists():
            state.best_model_checkpoint = str(best)
    if not args.save_only_model:
        trainer._save_optimizer_and_scheduler(str(aside))
        trainer._save_scaler(str(aside))
        trainer._save_rng_state(str(aside))
    if args.should_save:
        state.stateful_callbacks = {
            type(part).__name__: part.state()
            for part in [*trainer.callback_handler.callbacks, trainer.control]
            if isinstance(part, ExportableState)
        }
        state.save_to_json(str(aside / "trainer_state.json"))


def estimated_size(trainer: "DistillationTrainer") -> int:
    """Bytes of the next checkpoint: as many as the last one had."""
    newest = next(iter(checkpoints(Path(trainer.args.output_dir))), None)
    if newest:
        return size_of(newest)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter holds nothing between two uses, and ds_numel says what it has.
    return BYTES_A_TRAINED_WEIGHT * sum(getattr(p, "ds_numel", p.numel()) for p in trained)


def lack_of_space(output_dir: Path, size: int) -> str | None:
    """A sentence where a checkpoint of `size` bytes would fill the disk."""
    output_dir.mkdir(parents=True, exist_ok=True)
    free, wanted = shutil.disk_usage(output_dir).free, int(size * SPARE)
    if free >= wanted:
        return None
    last = next((path.name for path in checkpoints(output_dir)), "none")
    return (
        f"no space for a checkpoint: {free / 1e6:,.0f} MB free in {output_dir}, wanted "
        f"{wanted / 1e6:,.0f} MB. Nothing was written; the last good checkpoint is {last}. Make "
        "space, or choose an output_dir with more, then run the same command again"
    )


@contextlib.contextmanager
def names_a_full_disk(aside: Path) -> Iterator[None]:
    """torch.save says nothing of space where the disk is full; this does, and frees what it took."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(aside.parent).free
        if not full and free > 1 << 20:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        last = next((path.name for path in checkpoints(aside.parent)), "none")
        raise ValueError(
            f"the disk of {aside.parent} became full while a checkpoint was written "
            f"({free / 1e6:,.0f} MB free, {error}). It was removed; the last good checkpoint is "
            f"{last}. Make space, then run the same command again"
        ) from error


def delete_old(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the `limit` newest whole checkpoints, and the best one."""
    whole = [path for path in checkpoints(output_dir) if read_manifest(path)]
    for path in whole[limit:] if limit else []:
        if best is None or Path(best).name != path.name:
            old = path.rename(path.with_name(f"{OLD}{path.name}"))  # never half of a checkpoint-N
            shutil.rmtree(old, ignore_errors=True)  # what is left of it goes at the next start


def open_to_umask(paths: Iterable[Path]) -> None:
    """safetensors writes files that only their owner can read; give them the modes of all others."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
