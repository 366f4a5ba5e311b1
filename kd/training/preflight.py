"""What a run needs around it, checked before torch is imported and long before models load.

check_disk, which needs the models' configurations, comes a little later.
"""

import difflib
import importlib.util
import shutil
from pathlib import Path

from kd.losses.metrics import shown_metrics
from kd.model_files import CONFIG, check_files
from kd.run.folder_lock import check_folder, lock_folder
from kd.settings.training_recipe import Recipe

# Trackers of Transformers: the module that each needs, and the package that has it.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "trackio": ("trackio", "trackio"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "azure_ml": ("azureml", "azureml-core"),
}
# Whether a greater value is better; the other metrics do not say how good a student is.
GREATER_IS_BETTER = {"loss": False, "cross_entropy": False, "divergence": False, "hidden": False}
GREATER_IS_BETTER |= {"top1_agreement": True}


def check_surroundings(recipe: Recipe) -> None:
    """Collective: lock output_dir, and check trackers, metrics, hub names and the cache of rows.

    Raises ValueError for what is missing.
    """
    check_trackers(recipe.training.report_to)
    check_evaluations(recipe)
    check_hub_names(recipe)
    check_folder("data_cache", recipe.data.data_cache)
    lock_folder("output_dir", recipe.training.output_dir)


def check_hub_names(recipe: Recipe) -> None:
    """Raise ValueError for a model that is neither a folder nor to be had from the hub."""
    teacher = recipe.separate_teacher
    for name in [recipe.model_name, *([teacher.teacher] if teacher else [])]:
        if not Path(name).is_dir():
            check_files(name, CONFIG)


def check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker that does not exist or is not installed."""
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"wanted one of {', '.join(TRACKERS)}"
            raise ValueError(f"report_to: no tracker {name}; {hint}")
        module, package = TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"report_to: {name} is not installed; run pip install {package}, or remove it"
            )


def check_evaluations(recipe: Recipe) -> None:
    """Raise ValueError if the run cannot measure what it is to be judged by."""
    training = recipe.training
    best = training.metric_for_best_model
    if not recipe.data.eval_sources:
        wanted = {"eval_strategy": training.eval_strategy, "metric_for_best_model": best}
        for key, value in wanted.items():
            if value not in (None, "no"):
                raise ValueError(
                    f"{key}: {value}, but the recipe has no held-out rows; give eval_data"
                )
    if best is None:
        return
    hidden = bool(recipe.teacher and recipe.objective.hidden_weight)
    shown = shown_metrics(recipe.teacher is not None, hidden)
    logged = ["loss", *(name for name in shown if not name.startswith("on_policy_"))]
    name = best.removeprefix("eval_")
    if name not in logged:
        raise ValueError(
            f"metric_for_best_model: this run does not measure {best}; wanted one of "
            + ", ".join(f"eval_{each}" for each in logged)
        )
    greater = training.greater_is_better
    if greater is None:
        greater = not best.endswith("loss")  # Transformers' default
    if greater != GREATER_IS_BETTER.get(name, greater):
        raise ValueError(
            f"greater_is_better: {str(greater).lower()}"
            f"{' by default' if training.greater_is_better is None else ''}, but of {best} the "
            f"{'lower' if greater else 'greater'} value is better; set greater_is_better: "
            f"{str(not greater).lower()}"
        )


def lack_of_disk(output_dir: str, checkpoint: float, model: float, present: int) -> str | None:
    """An error message if the disk has no room for the start of a run, else None.

    Sizes are in bytes; `present` checkpoints exist already.
    """
    missing = max(0, 2 - present)
    free, wanted = shutil.disk_usage(output_dir).free, missing * checkpoint + model
    if free >= wanted:
        return None
    checkpoints = f"{missing} checkpoint{'s' if missing > 1 else ''} of {checkpoint / 1e6:,.1f} MB"
    return (
        f"output_dir: {free / 1e6:,.1f} MB free on the disk of {Path(output_dir)}; wanted "
        f"{wanted / 1e6:,.1f} MB for "
        + (f"{checkpoints} and " if checkpoint and missing else "")
        + f"the trained model of {model / 1e6:,.1f} MB. Free some space, or choose an output_dir "
        "on another disk"
    )
