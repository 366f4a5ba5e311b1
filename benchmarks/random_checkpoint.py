"""Checkpoints of random weights in the shapes of real models, for machines without a hub."""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from kd.models import awq_writer
from kd.models.tensor_files import INDEX

GROUP = 128
FILE_BYTES = 2**31  # approximate size of a written file


def qwen_config(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    pairs: int,
    vocab_size: int,
    tied: bool = False,
    dtype: str = "bfloat16",
) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        tie_word_embeddings=tied,
        dtype=dtype,
    )


def write_random(config: PretrainedConfig, form: str, folder: Path) -> int:
    """Write a checkpoint and return its size in bytes.

    `form` awq or nf4 packs the linear layers; otherwise they keep the dtype of the configuration.
    Linear layers of one shape share their random numbers, which saves time.
    """
    folder.mkdir(parents=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    packed = {
        name: PACKERS[form]
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head" and form in PACKERS
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    made: dict[tuple, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    places, total, count = {}, 0, 0
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    state = [item for item in model.state_dict().items() if item[0] not in tied]
    for name, tensor in state:
        owner = name.removesuffix(".weight")
        key = (owner in packed, "norm" in name, tuple(tensor.shape))
        if key not in made:
            value = torch.randn(tensor.shape, device=device).mul_(tensor.shape[-1] ** -0.5)
            value = torch.ones_like(value) if "norm" in name else value
            parts = packed[owner](value) if owner in packed else {"": value.to(config.dtype)}
            made[key] = {part: value.cpu().contiguous() for part, value in parts.items()}
        for part, value in made[key].items():
            tensors[f"{owner}.{part}" if part else name] = value.clone()
        if sum(value.nbytes for value in tensors.values()) > FILE_BYTES or name == state[-1][0]:
            count += 1
            file = f"model-{count}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(value.nbytes for value in tensors.values())
            tensors = {}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    settings = config.to_dict() | {"architectures": [type(model).__name__]}
    if form in QUANTIZATION:
        settings["quantization_config"] = QUANTIZATION[form]
    (folder / "config.json").write_text(json.dumps(settings, default=str))
    return total


def pack_awq(weight: Tensor) -> dict[str, Tensor]:
    return dict(zip(awq_writer.PARTS, awq_writer.quantize(weight, GROUP), strict=True))


def pack_nf4(weight: Tensor) -> dict[str, Tensor]:
    codes, state = quantize_4bit(weight.bfloat16(), compress_statistics=True, quant_type="nf4")
    described = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": codes} | described


PACKERS = {"awq": pack_awq, "nf4": pack_nf4}
QUANTIZATION = {
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
    },
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}
