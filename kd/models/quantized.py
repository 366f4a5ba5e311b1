"""Read a checkpoint's quantized format: its layers, and a model built of them without memory.

To add a format: write a file with a PackedLinear, as awq.py does, and add a line to READERS.
"""

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kd.models.awq import AwqLinear, check_awq
from kd.models.gptq import GptqLinear, check_gptq
from kd.models.nf4 import Nf4Linear
from kd.models.packed_linear import PackedLinear
from kd.models.tensor_files import TensorFiles
from kd.pretrained import load_config

READERS = {  # format -> (function that checks its settings, function that makes a layer)
    "awq": (check_awq, AwqLinear.of),
    "gptq": (check_gptq, GptqLinear.of),
    "bitsandbytes 4-bit": (None, Nf4Linear.of),
}
# Transformers reads these only with another package. For bitsandbytes it needs none, and its layers
# have kernels for few tokens and are known to PEFT.
NEED_EXTRA_PACKAGE = ("awq", "gptq")
QUANTIZE_COMMAND = "python train/quantize.py --model MODEL --output_dir FOLDER"
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class StoredParameter:
    """A tensor in the files and the modules that hold it as a parameter (several if tied)."""

    name: str  # in the files
    parameter: nn.Parameter  # on the meta device
    owners: list[tuple[nn.Module, str]]

    def assign(self, parameter: nn.Parameter) -> None:
        """Replace the meta parameter in every module that holds it."""
        for module, name in self.owners:
            module.register_parameter(name, parameter)


def quantization_settings(config: PretrainedConfig) -> dict | None:
    """The checkpoint's quantization_config."""
    return getattr(config, "quantization_config", None) or None


def quantization_format(settings: dict) -> str:
    """The format of a quantization_config: a key of READERS if it can be read here."""
    bits = "8" if settings.get("load_in_8bit") else "4"
    method = settings.get("quant_method", "unnamed")
    return f"{method} {bits}-bit" if method == "bitsandbytes" else method


def packed_format(name: str) -> str | None:
    """The key in READERS of the checkpoint's format; None if not quantized or not read here."""
    settings = quantization_settings(load_config(name))
    found = quantization_format(settings) if settings else None
    return found if found in READERS else None


def check_readable(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError if the checkpoint cannot be read into layers that ZeRO-3 can shard."""
    settings = quantization_settings(config)
    if settings:
        found = quantization_format(settings)
        if found not in READERS:
            raise ValueError(
                f"{name}: {found} weights are not read here; wanted one of {', '.join(READERS)}, "
                f"or no quantization. This command quantizes the original model: {QUANTIZE_COMMAND}"
            )
        check, _ = READERS[found]
        if check:
            check(settings, name)
    text = config.get_text_config().to_dict()
    if any(text.get(key) for key in EXPERTS):
        raise ValueError(
            f"{name}: a mixture of experts. Its tokens decide which layers run, so the ranks of a "
            "sharded teacher would gather different layers and wait for each other forever; leave "
            "teacher_deepspeed out, or cache the scores of the whole, unquantized teacher first "
            "(train/cache_teacher.py)"
        )


def empty_model(
    config: PretrainedConfig, files: TensorFiles, dtype: torch.dtype
) -> tuple[PreTrainedModel, list[StoredParameter]]:
    """The CausalLM with its parameters on the meta device, and where each one is stored.

    The tensors in the files decide on each layer: NAME.qweight makes it a packed one, NAME.weight
    leaves the Linear.

    Raises ValueError naming tensor and file if a tensor is missing or has the wrong shape.
    """
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = quantization_settings(config)
    if settings:
        _, make_layer = READERS[quantization_format(settings)]
        for name, module in list(model.named_modules()):
            if type(module) is not nn.Linear or module is model.get_output_embeddings():
                continue  # the loss reads the head's weight itself
            packed = make_layer(module, name, files, settings)
            if packed is not None:
                model.set_submodule(name, packed)
    model.tie_weights()  # no_init_weights skips it
    model.eval().requires_grad_(False)
    return model, stored_parameters(model, files)


def stored_parameters(model: nn.Module, files: TensorFiles) -> list[StoredParameter]:
    """Where each parameter of the model is stored; tied parameters appear once.

    Raises ValueError naming tensor and file if a tensor is missing or has the wrong shape.
    """
    found: dict[int, StoredParameter] = {}
    for prefix, module in model.named_modules():
        renamed = module.stored_as if isinstance(module, PackedLinear) else {}
        for name, parameter in module.named_parameters(recurse=False):
            key = f"{prefix}.{renamed.get(name, name)}" if prefix else name
            stored = found.setdefault(id(parameter), StoredParameter(key, parameter, []))
            stored.owners.append((module, name))
            files.used.add(key)
            if stored.name not in files.tensors:  # tied, and stored under its other name
                stored.name = key
    for stored in found.values():
        files.check_shape(stored.name, tuple(stored.parameter.shape))
    return list(found.values())
