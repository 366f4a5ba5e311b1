"""The layers of student and teacher that a recipe's hidden-state loss compares."""

from kd.losses.hidden import HiddenObjective, layer_map
from kd.models.frozen import teacher_base
from kd.models.inherit import inherited_pairs
from kd.pretrained import load_config
from kd.settings.training_recipe import Recipe


def hidden_objective(recipe: Recipe) -> HiddenObjective | None:
    """Resolve the layer map of the hidden-state loss; None without such a loss.

    Reads the configurations of both models and no weights. Raises ValueError for pairs of layers
    that the models do not have.
    """
    objective = recipe.objective
    if not recipe.live_teacher or not objective.hidden_weight:
        return None
    names = (recipe.model_name, teacher_base(recipe.live_teacher, recipe.model_name))
    configs = [load_config(name).get_text_config() for name in names]
    pairs = objective.hidden_layers or inherited_pairs(*configs)
    layers = layer_map(pairs, *(config.num_hidden_layers for config in configs))
    return HiddenObjective(objective.hidden_weight, objective.hidden_loss, layers)
