"""Fetch what a run reads from the hub, while no rank waits for another one in a collective.

A rank in a collective ends after ddp_timeout, however healthy the download is that it waits for.
Weights come last: mistakes in the settings and rows, and a run that does not fit, are told before.
"""

import os
import time
from collections.abc import Callable

import torch.distributed as dist

from kd.data.local_files import local_files
from kd.data.sources import hub_table
from kd.distributed import world_size
from kd.models.frozen import teacher_base
from kd.pretrained import model_folder
from kd.settings.training_recipe import Recipe

PAUSE = 0.5  # seconds between two looks at the other ranks


def download(recipe: Recipe) -> None:
    """Collective: fetch configurations, tokenizers and data sets; return when every rank has them.

    Raises ValueError on every rank for what one of them cannot have.
    """

    def fetch() -> None:
        for name in models(recipe):
            model_folder(name, weights=False)
        for source in [*recipe.data.sources, *recipe.data.eval_sources]:
            if local_files(source["path"]) is None:
                hub_table(source)

    on_all_ranks("rows", fetch)


def download_weights(recipe: Recipe, trains: bool = True) -> None:
    """Collective: fetch the weights of the models; return when every rank has them.

    Without `trains` the run scores with the teacher and does not load the student. Raises
    ValueError on every rank for what one of them cannot have.
    """

    def fetch() -> None:
        for name in models(recipe, trains):
            model_folder(name)

    on_all_ranks("weights", fetch)


def models(recipe: Recipe, trains: bool = True) -> list[str]:
    """The models that a recipe reads."""
    teacher = recipe.separate_teacher if trains else recipe.teacher
    taught = [teacher_base(teacher, recipe.model_name)] if teacher else []
    return [*taught, *([recipe.model_name] if trains else [])]


def on_all_ranks(what: str, fetch: Callable[[], None]) -> None:
    """Collective: call `fetch`, and wait outside of any collective until every rank has done so.

    Raises ValueError on every rank if that of one of them raises it.
    """
    store = launcher_store()
    key = f"kd/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    try:
        fetch()
    except ValueError as error:
        if store:
            store.set(f"{key}/mistake", str(error))
        raise
    if not store:
        return
    store.add(key, 1)
    while store.add(key, 0) < world_size():
        if store.check([f"{key}/mistake"]):
            raise ValueError(store.get(f"{key}/mistake").decode())
        time.sleep(PAUSE)


def launcher_store() -> dist.Store | None:
    """The store of torchrun or accelerate, which exists before any process group; else None.

    Without it, the ranks of one cache still wait for each other's files, by the locks of the hub's
    library. Ranks with other caches then have ddp_timeout to catch up.
    """
    own = os.environ
    if world_size() == 1 or own.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = own["MASTER_ADDR"], int(own["MASTER_PORT"])
    return dist.TCPStore(*place, is_master=False, wait_for_workers=False)
