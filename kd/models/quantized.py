"""Which layers a checkpoint's own format asks for, and a model built of them without memory.

To read another format: a file with a PackedLinear, as awq.py has it, and a line in READERS.
"""

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kd.models.awq import awq_layer, check_awq
from kd.models.gptq import check_gptq, gptq_layer
from kd.models.nf4 import nf4_layer
from kd.models.packed_linear import PackedLinear
from kd.models.tensor_files import TensorFiles

READERS = {  # quantisation -> (checks its settings, makes a layer)
    "awq": (check_awq, awq_layer),
    "gptq": (check_gptq, gptq_layer),
    "bitsandbytes 4-bit": (None, nf4_layer),
}
WRITER = "python -m kd.models.awq --model MODEL --output_dir FOLDER"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Slot:
    """One tensor of the files, and where in the model it belongs: twice if it is tied."""

    stored: str
    parameter: nn.Parameter  # on the meta device
    owners: list[tuple[nn.Module, str]]

    def put(self, parameter: nn.Parameter) -> None:
        for module, name in self.owners:
            module.register_parameter(name, parameter)


def quantization_settings(config: PretrainedConfig) -> dict | None:
    """The checkpoint's quantization_config."""
    return getattr(config, "quantization_config", None) or None


def quantization(settings: dict) -> str:
    """Its key in READERS, where it is read here."""
    bits = "8" if settings.get("load_in_8bit") else "4"
    method = settings.get("quant_method", "unnamed")
    return f"{method} {bits}-bit" if method == "bitsandbytes" else method


def has_own_layers(name: str) -> bool:
    """True for quantised checkpoints, in a folder or on the hub, that are read into our layers."""
    settings = quantization_settings(AutoConfig.from_pretrained(name))
    return bool(settings) and quantization(settings) in READERS


def only_read_here(name: str) -> bool:
    """True for AWQ and GPTQ, for which Transformers wants a package that we do not need.

    bitsandbytes' own layers have kernels for few tokens, and PEFT knows them.
    """
    settings = quantization_settings(AutoConfig.from_pretrained(name))
    return bool(settings) and quantization(settings) in ("awq", "gptq")


def check_teacher(name: str, sharded: bool) -> None:
    """Raises ValueError for a teacher that cannot be loaded so, by its configuration alone."""
    if sharded or has_own_layers(name):
        check_readable(AutoConfig.from_pretrained(name), name)


def check_readable(config: PretrainedConfig, name: str) -> None:
    """Raises ValueError for what cannot be read into layers that ZeRO-3 can shard."""
    settings = quantization_settings(config)
    if settings:
        method = quantization(settings)
        if method not in READERS:
            raise ValueError(
                f"{name}: {method} weights are not read here; wanted one of {', '.join(READERS)}, "
                f"or no quantisation. This makes one of the unquantised model: {WRITER}"
            )
        check, _ = READERS[method]
        if check:
            check(settings, name)
    text = config.get_text_config().to_dict()
    if any(text.get(key) for key in EXPERTS):
        raise ValueError(
            f"{name}: a mixture of experts. Which of its layers run depends on the tokens, so "
            "the ranks of a sharded teacher would gather different ones and wait for each other "
            "for ever; leave teacher_deepspeed out, or let it score the rows beforehand, whole and "
            "unquantised (train/cache_teacher.py)"
        )


def empty_model(
    config: PretrainedConfig, files: TensorFiles, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[Slot]]:
    """The CausalLM with parameters on the meta device, and a slot for each of its tensors.

    A layer is what its tensors in the files are: NAME.qweight makes a packed one, NAME.weight
    leaves the Linear. Raises ValueError naming tensor and file where one is missing or has
    another shape.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = quantization_settings(config)
    if settings:
        _, layer = READERS[quantization(settings)]
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear or module is model.get_output_embeddings():
                continue  # the loss reads the head's weight itself
            packed = layer(module, name, files, settings)
            if packed is not None:
                model.set_submodule(name, packed)
    model.tie_weights()  # no_init_weights skips it
    model.eval().requires_grad_(False)
    return model, find_slots(model, files)


def find_slots(model: nn.Module, files: TensorFiles) -> list[Slot]:
    slots: dict[int, Slot] = {}
    for prefix, module in model.named_modules():
        renamed = module.stored_as if isinstance(module, PackedLinear) else {}
        for name, parameter in module.named_parameters(recurse=False):
            stored = f"{prefix}.{renamed.get(name, name)}" if prefix else name
            slot = slots.setdefault(id(parameter), Slot(stored, parameter, []))
            slot.owners.append((module, name))
            files.used.add(stored)
            if slot.stored not in files.tensors:  # tied, and stored under its other name
                slot.stored = stored
    for slot in slots.values():
        files.check_shape(slot.stored, tuple(slot.parameter.shape))
    return list(slots.values())
