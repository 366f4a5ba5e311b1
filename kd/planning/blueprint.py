"""The tensors of a model with their shapes and bytes, computed from its configuration alone.

Models are built on the meta device. So Transformers, PEFT and bitsandbytes themselves decide which
modules exist, which of them are packed and which have adapters.
"""

import contextlib
import copy
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from kd.models.load import lora_config, nf4_config
from kd.models.sharding import without_zero_init
from kd.settings.distillation import ModelSettings

NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # numbers per scale; scales per second-level scale
NF4_CODES = 16  # entries of the float32 code table


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in the form in which a device stores it."""

    name: str
    numel: int  # as ZeRO counts it: words, if the numbers are packed
    itemsize: int  # bytes per element
    trained: bool = False
    replicated: bool = False  # not a Parameter, so ZeRO-3 cannot shard it

    @property
    def bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.numel * self.itemsize


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The causal language model on the meta device, with tied embeddings if the config says so.

    FlashAttention saves the same tensors as sdpa's kernel and need not be installed to be planned.
    """
    config = copy.deepcopy(config)  # from_config writes the dtype into it
    with without_zero_init(), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation="eager" if attention == "eager" else None,
        )
    model.tie_weights()  # no_init_weights skips it
    return model


def build_trained(
    config: PretrainedConfig, settings: ModelSettings, dtype: torch.dtype, cast: bool
) -> nn.Module:
    """The student as `kd.models.load` builds it, on the meta device.

    `cast`: DeepSpeed casts adapters to `dtype` as well. Without it, PEFT keeps adapters of
    half-precision weights in float32.
    """
    model = build(config, dtype, settings.attention)
    if settings.quantization == "nf4":
        # Silence progress bars: the library assumes that it is loading a model.
        with contextlib.redirect_stderr(io.StringIO()):
            keep = get_keys_to_not_convert(model)
            model = replace_with_bnb_linear(model, keep, nf4_config(dtype))
        model.is_loaded_in_4bit = True  # PEFT checks it
        model.requires_grad_(False)
        cast_weights(model, dtype)  # new biases are float32
    if settings.lora_rank:
        # Two tokens stand for the template's: the copies of the embedding matter, not their number.
        tokens = [0, 1] if settings.train_template_tokens else None
        model = get_peft_model(model, lora_config(settings, tokens))
    if cast:
        cast_weights(model, dtype)
    return model


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point weights, in place."""
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(module name, module, weight name, weight) of every weight; tied weights occur once."""
    seen = set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix, module, key, parameter


def stored_tensors(model: nn.Module) -> list[StoredTensor]:
    """All weights of a model; four-bit Linears as bitsandbytes stores them on a device."""
    found = []
    for _, module, key, parameter in named_weights(model):
        if isinstance(module, bnb.nn.Linear4bit) and key.endswith(".weight"):
            found += nf4_tensors(key, parameter.numel(), module.quant_storage.itemsize)
        else:
            found.append(stored_tensor(key, parameter))
    return found


def stored_tensor(name: str, tensor: Tensor) -> StoredTensor:
    """The description of an unpacked tensor of any shape."""
    return StoredTensor(name, tensor.numel(), tensor.element_size(), tensor.requires_grad)


def nf4_tensors(name: str, numel: int, storage: int, double: bool = True) -> list[StoredTensor]:
    """Codes and scales of `numel` NF4 numbers, as in bitsandbytes.functional.QuantState.

    `storage` is the itemsize of the packed codes; with `double` the scales are quantized as well.
    """
    codes, blocks = math.ceil(numel / 2), math.ceil(numel / NF4_BLOCK)
    found = [StoredTensor(name, math.ceil(codes / storage), storage)]
    if double:
        found += [
            StoredTensor(f"{name}.absmax", blocks, 1, replicated=True),
            StoredTensor(
                f"{name}.nested_absmax", math.ceil(blocks / ABSMAX_BLOCK), 4, replicated=True
            ),
            StoredTensor(f"{name}.offset", 1, 4, replicated=True),
        ]
    else:
        found.append(StoredTensor(f"{name}.absmax", blocks, 4, replicated=True))
    return [*found, StoredTensor(f"{name}.quant_map", NF4_CODES, 4, replicated=True)]


def checkpoint_tensors(config: PretrainedConfig, dtype: str) -> list[StoredTensor]:
    """All weights of a frozen model as its checkpoint stores them: plain, AWQ, GPTQ, bitsandbytes.

    Weights in other formats are counted in the dtype of the model, which overestimates them.
    """
    stored = config.dtype if dtype == "auto" else getattr(torch, dtype)
    model = build(config, stored or torch.float32)
    model.requires_grad_(False)
    settings = getattr(config, "quantization_config", None)
    pack = PACKED.get((settings or {}).get("quant_method"))
    if pack is None:
        return stored_tensors(model)
    skipped = settings.get("modules_to_not_convert") or settings.get("llm_int8_skip_modules") or []
    skipped = [*skipped, *get_keys_to_not_convert(model)]
    found = []
    for prefix, module, key, parameter in named_weights(model):
        packed = isinstance(module, nn.Linear) and not any(part in prefix for part in skipped)
        if packed and key.endswith(".weight"):
            found += pack(prefix, module, settings)
        else:
            found.append(stored_tensor(key, parameter))
    return found


def awq_tensors(name: str, linear: nn.Linear, settings: dict) -> list[StoredTensor]:
    """A Linear in AutoAWQ's GEMM layout: eight 4-bit numbers per int32."""
    words = linear.out_features // 8
    group = settings.get("group_size", 128)
    groups = 1 if group == -1 else linear.in_features // group
    return [
        StoredTensor(f"{name}.qweight", linear.in_features * words, 4),
        StoredTensor(f"{name}.qzeros", groups * words, 4),
        StoredTensor(f"{name}.scales", groups * linear.out_features, 2),
    ]


def gptq_tensors(name: str, linear: nn.Linear, settings: dict) -> list[StoredTensor]:
    """A Linear in GPTQ's layout: packed weights and zeros, scales, and the group of every input."""
    per_word = 32 // settings.get("bits", 4)
    group = settings.get("group_size", 128)
    groups = 1 if group == -1 else math.ceil(linear.in_features / group)
    return [
        StoredTensor(f"{name}.qweight", linear.in_features // per_word * linear.out_features, 4),
        StoredTensor(f"{name}.qzeros", groups * linear.out_features // per_word, 4),
        StoredTensor(f"{name}.scales", groups * linear.out_features, 2),
        StoredTensor(f"{name}.g_idx", linear.in_features, 4),
    ]


def bitsandbytes_tensors(name: str, linear: nn.Linear, settings: dict) -> list[StoredTensor]:
    """A Linear that bitsandbytes stores in 8 or 4 bits."""
    if not settings.get("load_in_4bit"):
        return [  # 8 bits: codes, and a float32 scale per row
            StoredTensor(f"{name}.weight", linear.weight.numel(), 1),
            StoredTensor(f"{name}.SCB", linear.out_features, 4),
        ]
    double = settings.get("bnb_4bit_use_double_quant", False)
    storage = getattr(torch, settings.get("bnb_4bit_quant_storage", "uint8")).itemsize
    return nf4_tensors(f"{name}.weight", linear.weight.numel(), storage, double)


PACKED = {"awq": awq_tensors, "gptq": gptq_tensors, "bitsandbytes": bitsandbytes_tensors}
