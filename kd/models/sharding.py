"""A teacher spread over all processes by ZeRO-3, streamed from disk: no process ever holds it whole.

Every rank reads only its own range of bytes of every tensor.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.integrations.deepspeed as integration
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from kd.models.heads import backbone_only

CHECKPOINT_FILES = ["*.json", "*.safetensors"]


def load_sharded(name: str, ds_config: str, attn_implementation: str, dtype: str = "auto"):
    """(DeepSpeed engine, module) of the causal language model in a folder or on the hub.

    `ds_config` is a ZeRO-3 JSON without a precision section. The engine returns hidden states.
    Raises ValueError for checkpoints that cannot be sharded, the same on every rank.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    folder = checkpoint_folder(name)
    files = tensor_files(folder)
    config = AutoConfig.from_pretrained(folder, attn_implementation=attn_implementation)
    check_can_be_sharded(config, name)
    dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
    settings = engine_settings(ds_config)
    # The device override alone: with zero.Init's own dtype every float tensor, rotary frequencies
    # included, would be cast, and every logit be slightly wrong.
    init = deepspeed.zero.Init(
        config_dict_or_path=settings,
        dtype=dtype,
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )
    with without_zero_init(), no_init_weights(), init:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # no_init_weights skips it, and an untied head would stay as it was made
    model.eval().requires_grad_(False)
    fill_shards(model, files)
    backbone_only(model)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine, model


@contextlib.contextmanager
def without_zero_init() -> Iterator[None]:
    """With the student under ZeRO-3 Transformers would shard a teacher in the student's way, too."""
    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def engine_settings(ds_config: str) -> dict:
    """The JSON with the one number that DeepSpeed insists on. Raises ValueError on other stages."""
    settings = json.loads(Path(ds_config).read_text())
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ValueError(f"teacher_deepspeed: {ds_config} has ZeRO stage {stage}; wanted 3")
    for precision in ("bf16", "fp16"):
        if precision in settings:
            raise ValueError(
                f"teacher_deepspeed: {ds_config} has a {precision} section, which would cast the "
                "teacher's tensors; remove it (every tensor keeps the type of its file)"
            )
    return settings | {"train_micro_batch_size_per_gpu": 1}


def check_can_be_sharded(config, name: str) -> None:
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method")
        raise ValueError(
            f"teacher {name}: {method} weights cannot be sharded yet; leave teacher_deepspeed out "
            "(the teacher whole on every GPU), or use the unquantised checkpoint"
        )
    settings = config.get_text_config().to_dict()
    if settings.get("num_experts") or settings.get("num_local_experts"):
        raise ValueError(
            f"teacher {name}: a mixture of experts gathers other modules on every rank, which "
            "ZeRO-3 answers with a hang; leave teacher_deepspeed out"
        )


def checkpoint_folder(name: str) -> Path:
    """The folder itself, or the hub's files, downloaded by one process a machine."""
    if Path(name).is_dir():
        return Path(name)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        snapshot_download(name, allow_patterns=CHECKPOINT_FILES)
    dist.barrier()
    return Path(snapshot_download(name, local_files_only=True, allow_patterns=CHECKPOINT_FILES))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file. Raises ValueError where a file of the index is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder}: {', '.join(missing)} missing, though the index names it")
        return {name: folder / file for name, file in names.items()}
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder}: no safetensors file; convert the checkpoint with Transformers")
    with safe_open(file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def fill_shards(model: nn.Module, files: dict[str, Path]) -> None:
    """Copy this rank's range of every tensor into `param.ds_tensor`.

    Raises ValueError naming tensor and file where one is missing or has another shape.
    """
    rank = dist.get_rank()
    parameters = list(model.named_parameters())  # a tied tensor once, under its first name
    handles: dict[Path, object] = {}
    for name, parameter in tqdm(
        parameters, desc="streaming the teacher", unit="tensor", disable=rank != 0
    ):
        if name not in files:
            raise ValueError(f"the teacher's checkpoint has no tensor {name}")
        file = files[name]
        if file not in handles:
            handles[file] = safe_open(file, "pt")
        source = handles[file].get_slice(name)
        shape = tuple(source.get_shape())
        if shape != tuple(parameter.ds_shape):
            raise ValueError(f"{file}: {name} is {shape}; wanted {tuple(parameter.ds_shape)}")
        shard = parameter.ds_tensor  # flat, ceil(numel / ranks) numbers, zero-padded at the end
        start = rank * shard.numel()
        piece = flat_range(source, shape, start, min(start + shard.numel(), parameter.ds_numel))
        shard.data[: len(piece)].copy_(piece.to(shard.dtype))


def flat_range(source, shape: tuple[int, ...], start: int, end: int) -> torch.Tensor:
    """Numbers start..end of the flattened tensor, reading only the rows that hold them."""
    if end <= start:
        return torch.empty(0)
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = start // row, -(-end // row)
    return source[first:last].reshape(-1)[start - first * row : end - first * row]
