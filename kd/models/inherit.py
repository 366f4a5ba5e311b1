"""Build a student from some of its parent's layers: embeddings, final norm and head come along.

Inheritune (Sanyal et al. 2024, arXiv 2404.08634) keeps the first layers, DistilBERT every second.
The student's config.json records which layers it has, so that models trained from it know, too.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kd.models.adapters import is_adapter
from kd.pretrained import load_config

# Their layers are the list model.layers, have equal shapes, and depend on their position only
# through PER_LAYER.
ARCHITECTURES = (
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
PER_LAYER = ("layer_types", "no_rope_layers")  # configuration keys with one value per layer
ORIGIN = "inherited"  # configuration key that records the student's origin


def first(keep: int, depth: int) -> list[int]:
    """The first `keep` of `depth` layers."""
    return list(range(keep))


def last(keep: int, depth: int) -> list[int]:
    """The last `keep` of `depth` layers."""
    return list(range(depth - keep, depth))


def even(keep: int, depth: int) -> list[int]:
    """Evenly spaced layers that include the first and the last; with keep 1, the first."""
    return [round(n * (depth - 1) / max(keep - 1, 1)) for n in range(keep)]


CHOICES = {"first": first, "last": last, "even": even}


def check_keep(keep: int, depth: int) -> None:
    """Raise ValueError if a parent of `depth` layers does not have `keep` of them."""
    if not 1 <= keep <= depth:
        raise ValueError(f"keep: {keep}; wanted 1 to {depth}, the number of the parent's layers")


def check_layers(layers: list[int], depth: int) -> None:
    """Raise ValueError if `layers` are not increasing indices of the parent's `depth` layers."""
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(
            f"layers: {layers}; wanted increasing numbers from 0 to {depth - 1}, the parent's "
            "layers"
        )


def parent_config(name: str) -> PreTrainedConfig:
    """Load the configuration of a parent before its weights.

    Raises ValueError for adapters, unsupported architectures and quantized parents.
    """
    if is_adapter(name):
        raise ValueError(
            f"parent: {name} is a LoRA adapter; wanted a whole model: python train/merge.py "
            f"--adapter {name} --output_dir MERGED, then --parent MERGED"
        )
    config = load_config(name)
    check_parent(config)
    return config


def check_parent(config: PreTrainedConfig) -> None:
    """Raise ValueError, with the reason, if layers of this parent cannot be inherited."""
    kind, supported = config.model_type, ", ".join(ARCHITECTURES)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{kind}: a multimodal model, and its text model alone is not a checkpoint that can be "
            f"trained here; wanted a text-only parent of {supported}"
        )
    if kind not in ARCHITECTURES:
        experts = any("expert" in key for key in config.to_dict())
        reason = (
            "because it is a mixture of experts"
            if experts
            else "because nobody has checked whether they depend on each other or on their position"
        )
        raise ValueError(f"{kind}: its layers cannot be inherited, {reason}; wanted {supported}")
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found["quant_method"] if isinstance(found, dict) else found.quant_method.value
        raise ValueError(
            f"the parent is quantized ({method}), but the student is trained from its weights; "
            "inherit from the bfloat16 or float32 checkpoint that it was made from (its name "
            "usually lacks -AWQ, -GPTQ or -bnb-4bit), and use the quantized one as teacher in "
            "train/distill.py"
        )


def student_config(parent: PreTrainedConfig, layers: list[int], name: str) -> PreTrainedConfig:
    """The parent's configuration, reduced to `layers`, with the parent's `name` as origin."""
    config, depth = copy.deepcopy(parent), parent.num_hidden_layers
    config.num_hidden_layers = len(layers)
    for key in PER_LAYER:
        values = getattr(parent, key, None)
        if values is not None:
            setattr(config, key, [values[n] for n in layers])
    # Qwen: attention slides from this layer on. Transformers reads layer_types, others this key.
    window = getattr(parent, "max_window_layers", None)
    if window is not None:
        config.max_window_layers = sum(n < window for n in layers)
    setattr(config, ORIGIN, {"parent": name, "layers": layers, "of": depth})
    return config


def inherited_pairs(student: PreTrainedConfig, teacher: PreTrainedConfig) -> list[str] | None:
    """The layer map "student:teacher" for hidden states; None if the depths do not match.

    Hidden state n is the output of layer n, counted from 1. Each state of the student maps to that
    of the layer it was inherited from. The last maps to the teacher's last, because both come after
    the final norm.
    """
    origin = getattr(student, ORIGIN, None)
    depth = teacher.num_hidden_layers
    if not origin or origin["of"] != depth or len(origin["layers"]) != student.num_hidden_layers:
        return None
    teacher_states = [n + 1 for n in origin["layers"][:-1]] + [depth]
    return [f"{number}:{state}" for number, state in enumerate(teacher_states, 1)]


def inherit(parent: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """Build a new model with the parent's `layers` (counted from 0), in the parent's dtype.

    With all layers it equals its parent bit for bit.

    Raises ValueError for unsupported architectures, quantized parents and wrong layers.
    """
    check_parent(parent.config)
    check_layers(layers, parent.config.num_hidden_layers)
    config = student_config(parent.config, layers, parent.name_or_path)
    student = AutoModelForCausalLM.from_config(config, dtype=parent.dtype)
    renamed = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    weights = {}
    for name, tensor in parent.state_dict().items():
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in renamed:
            weights[renamed[prefix] + name[len(prefix) :]] = tensor
        elif not name.startswith("model.layers."):
            weights[name] = tensor
    with torch.no_grad():
        student.load_state_dict(weights, strict=True)
    student.generation_config = copy.deepcopy(parent.generation_config)
    return student.eval()
