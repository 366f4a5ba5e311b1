"""A student made of some of its parent's blocks: everything but the left-out blocks is inherited.

Inheritune (Sanyal et al. 2024, arXiv 2404.08634) takes the first blocks, DistilBERT every second;
embeddings, final norm and head come along, or the student starts from nothing. The student's
config.json says which blocks it has, so that whatever is trained from it still knows.
"""

import copy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

# Their blocks are the list model.layers, alike in shape, and know their number by PER_BLOCK alone.
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
PER_BLOCK = ("layer_types", "no_rope_layers")  # keys of a configuration with one value a block
ORIGIN = "inherited"  # the key of a student's configuration that holds its origin


def first(keep: int, depth: int) -> list[int]:
    return list(range(keep))


def last(keep: int, depth: int) -> list[int]:
    return list(range(depth - keep, depth))


def even(keep: int, depth: int) -> list[int]:
    """Evenly spaced, the first and the last block among them; the first where it is one."""
    return [round(n * (depth - 1) / max(keep - 1, 1)) for n in range(keep)]


CHOICES = {"first": first, "last": last, "even": even}


def check_keep(keep: int, depth: int) -> None:
    """Raise ValueError where a parent of `depth` blocks has not `keep` of them."""
    if not 1 <= keep <= depth:
        raise ValueError(f"keep: {keep}; wanted 1 to {depth}, the number of the parent's blocks")


def check_layers(layers: list[int], depth: int) -> None:
    """Raise ValueError where `layers` are not increasing numbers of the parent's blocks."""
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise ValueError(
            f"layers: {layers}; wanted increasing numbers from 0 to {depth - 1}, the parent's blocks"
        )


def parent_config(name: str) -> PreTrainedConfig:
    """The configuration of a parent, before its weights are loaded.

    Raises ValueError, with the remedy, for adapters, other architectures and quantised parents.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(
            f"parent: {name} is a LoRA adapter; wanted a whole model: python train/merge.py "
            f"--adapter {name} --output_dir MERGED, then --parent MERGED"
        )
    config = AutoConfig.from_pretrained(name)
    check_parent(config)
    return config


def check_parent(config: PreTrainedConfig) -> None:
    """Raise ValueError where blocks of this parent cannot be inherited, with the reason."""
    kind, supported = config.model_type, ", ".join(ARCHITECTURES)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{kind}: it reads more than text, and its text model alone is no checkpoint that "
            f"could be trained here; wanted a text-only parent of {supported}"
        )
    if kind not in ARCHITECTURES:
        experts = any("expert" in key for key in config.to_dict())
        reason = (
            "it is a mixture of experts"
            if experts
            else "whether its blocks depend on each other or on their number was not checked"
        )
        raise ValueError(f"{kind}: its blocks cannot be inherited, {reason}; wanted {supported}")
    found = getattr(config, "quantization_config", None)
    if found is not None:
        method = found["quant_method"] if isinstance(found, dict) else found.quant_method.value
        raise ValueError(
            f"the parent is quantised ({method}), and a student is trained on "
            "from its weights; inherit from the checkpoint in bfloat16 or float32 that it was made "
            "from (for a name that ends in -AWQ, -GPTQ or -bnb-4bit, the one without), and give "
            "the quantised one as teacher: to train/distill.py"
        )


def student_config(parent: PreTrainedConfig, layers: list[int], name: str) -> PreTrainedConfig:
    """The parent's configuration with the values of these blocks, and where they come from."""
    config, depth = copy.deepcopy(parent), parent.num_hidden_layers
    config.num_hidden_layers = len(layers)
    for key in PER_BLOCK:
        values = getattr(parent, key, None)
        if values is not None:
            setattr(config, key, [values[n] for n in layers])
    # Qwen: from this block on attention slides. Transformers reads layer_types, others this.
    window = getattr(parent, "max_window_layers", None)
    if window is not None:
        config.max_window_layers = sum(n < window for n in layers)
    setattr(config, ORIGIN, {"parent": name, "layers": layers, "of": depth})
    return config


def inherited_pairs(student: PreTrainedConfig, teacher: PreTrainedConfig) -> list[str] | None:
    """The layer map "student:teacher" of a student of blocks of such a teacher, else None.

    Layer n is behind block n, counted from 1: each block of the student goes to the one that it
    was. But its last layer goes to the teacher's last, for both are behind the final norm.
    """
    origin = getattr(student, ORIGIN, None)
    depth = teacher.num_hidden_layers
    if not origin or origin["of"] != depth or len(origin["layers"]) != student.num_hidden_layers:
        return None
    theirs = [n + 1 for n in origin["layers"][:-1]] + [depth]
    return [f"{ours}:{layer}" for ours, layer in enumerate(theirs, 1)]


def inherit(parent: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A new model with the parent's blocks `layers` (counted from 0), in the parent's type.

    With all blocks it equals its parent to the last bit. Raises ValueError for other architectures,
    quantised parents and wrong layers.
    """
    check_parent(parent.config)
    check_layers(layers, parent.config.num_hidden_layers)
    config = student_config(parent.config, layers, parent.name_or_path)
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
