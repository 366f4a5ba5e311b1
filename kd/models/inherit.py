"""A student made of some of its parent's blocks: everything but the left-out blocks is inherited.

Inheritune (Sanyal et al. 2024, arXiv 2404.08634) takes the first blocks, DistilBERT every second;
embeddings, final norm and head come along, or the student starts from nothing.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

# Their blocks are one list and are alike, and nothing else in the model counts them.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def check_layers(layers: list[int], depth: int) -> None:
    """Raise ValueError where `layers` are not increasing numbers of the parent's blocks."""
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(
            f"layers: {layers}; wanted increasing numbers from 0 to {depth - 1}, the parent's blocks"
        )


def inherit(parent: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A new model with the parent's blocks `layers` (counted from 0), in the parent's type.

    With all blocks it equals its parent to the last bit. Raises ValueError for other architectures,
    quantised parents and wrong layers.
    """
    config = copy.deepcopy(parent.config)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"{config.model_type}: its blocks cannot be inherited yet; wanted one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if getattr(parent, "is_quantized", False):
        raise ValueError("the parent is quantised; inherit from its unquantised checkpoint")
    check_layers(layers, config.num_hidden_layers)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):  # full or sliding attention, block by block
        config.layer_types = [config.layer_types[n] for n in layers]
    student = AutoModelForCausalLM.from_config(config, dtype=parent.dtype)
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    weights = {}
    for name, tensor in parent.state_dict().items():
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in place:
            weights[place[prefix] + name[len(prefix) :]] = tensor
        elif not name.startswith("model.layers."):
            weights[name] = tensor
    with torch.no_grad():
        student.load_state_dict(weights, strict=True)
    student.generation_config = copy.deepcopy(parent.generation_config)
    return student.eval()
