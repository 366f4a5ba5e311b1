"""Find mistakes in a recipe from its settings and the models' configurations alone."""

from pathlib import Path

from kd.data.packing import check_packing
from kd.distributed import broadcast, rank
from kd.models.attention import check_attention
from kd.models.frozen import check_teacher, teacher_base
from kd.models.layer_pairs import hidden_objective
from kd.models.liger import check_liger
from kd.models.load import check_trainable
from kd.models.readout import check_head
from kd.planning.activations import CannotTrace
from kd.planning.disk import checkpoint_bytes
from kd.planning.fitting import layout_of
from kd.planning.machine import present_machine
from kd.pretrained import load_config
from kd.settings.training_recipe import Recipe
from kd.training.checkpoints.checkpoint import checkpoints
from kd.training.preflight import lack_of_disk


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for settings of a training run that cannot work with its models.

    The parse has checked what the settings alone say, sources of rows included.
    """
    check_attention(recipe.model.attention)
    names, live = [recipe.model_name], recipe.live_teacher
    if live:
        check_teacher(live, recipe.model)
        hidden_objective(recipe)
        names.append(teacher_base(live, recipe.model_name))
    for name in names:
        config = load_config(name)
        if name == recipe.model_name:
            check_trainable(config, name, recipe.model)
        check_head(config, name)
        check_liger(recipe.model.liger_kernels, config, name)
        if recipe.data.packing:
            check_packing(config, name)
    check_disk(recipe)


def check_disk(recipe: Recipe) -> None:
    """Collective: raise ValueError if the disk has no room for two checkpoints and the model.

    A full disk after the first checkpoint would cost the time of all later steps.
    """
    training = recipe.training
    layout = layout_of(recipe, recipe.data.max_length, present_machine(training))
    try:
        checkpoint, model = checkpoint_bytes(layout)
    except CannotTrace:
        return  # the size of this model is not known before it is loaded
    saves = training.save_strategy != "no"
    size = (model if training.save_only_model else checkpoint) if saves else 0.0
    problem = None
    if rank() == 0:
        present = len(checkpoints(Path(training.output_dir)))
        problem = lack_of_disk(training.output_dir, size, model, present)
    problem = broadcast(problem)
    if problem:
        raise ValueError(problem)
