"""Join the ranks of a run, and settle what its recipe leaves to the present machine."""

import os
import socket
from pathlib import Path
from typing import Any

from accelerate import PartialState

from kd.distributed import broadcast, print_rank0, rank, world_size
from kd.gpu import check_gpus
from kd.planning.choices import PLANNED, choose, lines
from kd.planning.machine import present_machine, trains_on_cpu
from kd.recipe import NONE
from kd.run.build_lock import use_build_locks
from kd.run.run_record import read_record
from kd.settings.machine_file import Preferences
from kd.settings.training import LAUNCHED, set_by_accelerate
from kd.settings.training_recipe import Recipe
from kd.training.checkpoints.checkpoint import checkpoints
from kd.training.downloads import download, download_weights
from kd.training.watchdog import collective_timeout


def settle(recipe: Recipe, trains: bool = True) -> Recipe:
    """Collective: choose every key that is `auto`, tell why, and make Transformers' arguments.

    A run that `trains` and goes on from a checkpoint in output_dir keeps its choices; one that does
    not fills a teacher cache. Raises ValueError for what cannot work with the chosen values, for
    models and data sets that cannot be had, and for GPUs that the installed torch cannot use.
    """
    training = recipe.training
    if training.use_cpu is not True and not set_by_accelerate("ACCELERATE_USE_CPU"):
        check_gpus()
    use_build_locks()
    download(recipe)
    if not trains:
        download_weights(recipe, trains)  # their hash is part of the cache
    cpu = trains_on_cpu(training)
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it found none
    PartialState(
        cpu=cpu,
        **({"backend": training.ddp_backend} if training.ddp_backend else {}),
        **({"timeout": collective_timeout(training.ddp_timeout)} if world_size() > 1 else {}),
    )
    earlier = earlier_choices(training.output_dir) if trains else {}
    recipe = choose(recipe, present_machine(training), earlier, trains)
    print_rank0(lines(recipe))
    if recipe.training.deepspeed not in (NONE, LAUNCHED) and "RANK" not in os.environ:
        be_the_only_rank()
    return recipe.with_arguments()


def be_the_only_rank() -> None:
    """Set what a launcher sets for one process; DeepSpeed does not start without it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def earlier_choices(output_dir: str) -> dict[str, Any]:
    """Collective: what the run in this folder has chosen, if it left a checkpoint.

    With another number of processes, the sharding of the teacher is chosen again; the student's
    engine is kept, since its checkpoint belongs to it.
    """
    found: dict[str, Any] = {}
    if rank() == 0 and checkpoints(Path(output_dir)):
        record = read_record(output_dir)
        kept = {*vars(Preferences()), *PLANNED}
        if record.get("plan", {}).get("processes") != world_size():
            kept -= {"teacher_deepspeed", "teacher_sharded_over"}
        found = {key: value for key, value in record.get("recipe", {}).items() if key in kept}
    return broadcast(found)
