"""A model without its weights: every tensor's shape and bytes, from the configuration alone.

Models are built on the meta device, so that Transformers, PEFT and bitsandbytes themselves decide
which modules there are, which of them are packed and which have adapters.
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
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from kd.models.load import four_bit, lora_config
from kd.models.sharding import without_zero_init
from kd.settings.distillation import ModelSettings

NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # numbers with one scale; scales with one scale of their own
NF4_CODES, ABSMAX_CODES = 16, 256  # entries of the tables, float32; the second one is shared


@dataclass(frozen=True)
class Piece:
    """One tensor as a device holds it."""

    name: str
    numel: int  # as ZeRO counts it: words, where the numbers are packed
    itemsize: int
    trained: bool = False
    replicated: bool = False  # no Parameter, so that ZeRO-3 cannot shard it

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize


def read_config(name: str) -> PretrainedConfig:
    """The configuration of a hub name or folder. Raises ValueError where there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: no configuration can be read ({str(error).splitlines()[0]}); wanted a hub "
            "name, or a folder with a config.json"
        ) from error


def build(config: PretrainedConfig, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The causal language model on the meta device, its head tied where the config says so.

    FlashAttention keeps what sdpa's kernel keeps, and need not be installed to plan with it.
    """
    config = copy.deepcopy(config)  # from_config writes the type into it
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
    """The student as `kd.models.load` makes it; `cast`: DeepSpeed brings adapters to `dtype`, too.

    Without it PEFT keeps adapters on half-precision weights in float32.
    """
    model = build(config, dtype, settings.attn_implementation)
    if settings.quantization == "nf4":
        # The progress bars and notes of a library that thinks it is loading.
        with contextlib.redirect_stderr(io.StringIO()):
            keep = get_keys_to_not_convert(model)
            model = replace_with_bnb_linear(model, keep, four_bit(dtype))
        model.is_loaded_in_4bit = True  # PEFT asks for it
        model.requires_grad_(False)
        cast_weights(model, dtype)  # new biases are float32
    if settings.lora_rank:
        # Two rows stand for the template's tokens: their number hardly matters, the copies do.
        tokens = [0, 1] if settings.train_template_tokens else None
        model = get_peft_model(model, lora_config(settings, tokens))
    if cast:
        cast_weights(model, dtype)
    return model


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(a module's name, the module, its weight's name, the weight); tied ones once."""
    seen = set()
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix, module, key, parameter


def pieces_of(model: nn.Module) -> list[Piece]:
    """All weights of a model; four-bit Linears as bitsandbytes stores them."""
    found = []
    for _, module, key, parameter in named_weights(model):
        if isinstance(module, bnb.nn.Linear4bit) and key.endswith(".weight"):
            found += nf4_pieces(key, parameter.numel(), module.quant_storage.itemsize)
        else:
            found.append(piece(key, parameter))
    return found


def piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tensor.numel(), tensor.element_size(), tensor.requires_grad)


def nf4_pieces(name: str, numel: int, storage: int, double: bool = True) -> list[Piece]:
    """Codes and scales of `numel` numbers, as bitsandbytes.functional.QuantState has them."""
    codes, blocks = math.ceil(numel / 2), math.ceil(numel / NF4_BLOCK)
    found = [Piece(name, math.ceil(codes / storage), storage)]
    if double:
        found += [
            Piece(f"{name}.absmax", blocks, 1, replicated=True),
            Piece(f"{name}.nested_absmax", math.ceil(blocks / ABSMAX_BLOCK), 4, replicated=True),
            Piece(f"{name}.offset", 1, 4, replicated=True),
        ]
    else:
        found.append(Piece(f"{name}.absmax", blocks, 4, replicated=True))
    return [*found, Piece(f"{name}.quant_map", NF4_CODES, 4, replicated=True)]


def checkpoint_pieces(config: PretrainedConfig, dtype: str) -> list[Piece]:
    """A frozen model as its checkpoint stores it: plain, AWQ, GPTQ, or bitsandbytes.

    Weights of other formats are counted in the type of the rest, which is more than they take.
    """
    stored = config.dtype if dtype == "auto" else getattr(torch, dtype)
    model = build(config, stored or torch.float32)
    model.requires_grad_(False)
    settings = getattr(config, "quantization_config", None)
    pack = PACKED.get((settings or {}).get("quant_method"))
    if pack is None:
        return pieces_of(model)
    skipped = settings.get("modules_to_not_convert") or settings.get("llm_int8_skip_modules") or []
    skipped = [*skipped, *get_keys_to_not_convert(model)]
    found = []
    for prefix, module, key, parameter in named_weights(model):
        packed = isinstance(module, nn.Linear) and not any(part in prefix for part in skipped)
        if packed and key.endswith(".weight"):
            found += pack(prefix, module, settings)
        else:
            found.append(piece(key, parameter))
    return found


def awq_pieces(name: str, linear: nn.Linear, settings: dict) -> list[Piece]:
    """AutoAWQ's GEMM layout: eight numbers of four bits in an int32."""
    words = linear.out_features // 8
    group = settings.get("group_size", 128)
    groups = 1 if group == -1 else linear.in_features // group
    return [
        Piece(f"{name}.qweight", linear.in_features * words, 4),
        Piece(f"{name}.qzeros", groups * words, 4),
        Piece(f"{name}.scales", groups * linear.out_features, 2),
    ]


def gptq_pieces(name: str, linear: nn.Linear, settings: dict) -> list[Piece]:
    per_word = 32 // settings.get("bits", 4)
    group = settings.get("group_size", 128)
    groups = 1 if group == -1 else math.ceil(linear.in_features / group)
    return [
        Piece(f"{name}.qweight", linear.in_features // per_word * linear.out_features, 4),
        Piece(f"{name}.qzeros", groups * linear.out_features // per_word, 4),
        Piece(f"{name}.scales", groups * linear.out_features, 2),
        Piece(f"{name}.g_idx", linear.in_features, 4),
    ]


def bitsandbytes_pieces(name: str, linear: nn.Linear, settings: dict) -> list[Piece]:
    if not settings.get("load_in_4bit"):
        return [  # eight bits: codes, and a float32 scale a row
            Piece(f"{name}.weight", linear.weight.numel(), 1),
            Piece(f"{name}.SCB", linear.out_features, 4),
        ]
    double = settings.get("bnb_4bit_use_double_quant", False)
    storage = getattr(torch, settings.get("bnb_4bit_quant_storage", "uint8")).itemsize
    return nf4_pieces(f"{name}.weight", linear.weight.numel(), storage, double)


PACKED = {"awq": awq_pieces, "gptq": gptq_pieces, "bitsandbytes": bitsandbytes_pieces}
