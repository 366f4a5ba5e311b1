"""Teachers streamed from disk: spread over all processes by ZeRO-3, or whole on each.

Sharded, every rank reads only its own range of bytes of every tensor, and never holds more than its
shard and one tensor. Packed tensors (AWQ, NF4, GPTQ) are sharded as they are: a 4-bit teacher costs
a rank its bytes / ranks, and the layer that is being used.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.integrations.deepspeed as integration
from huggingface_hub import snapshot_download
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from kd.models.blocks import decoder_blocks
from kd.models.heads import backbone_only
from kd.models.quantized import Slot, check_readable, empty_model
from kd.models.tensor_files import TensorFiles

CHECKPOINT_FILES = ["*.json", "*.safetensors"]
COMPUTED = "rotary_emb.inv_freq"  # in old files; the configuration gives it


def load_sharded(name: str, ds_config: str, attn_implementation: str, dtype: str = "auto"):
    """(DeepSpeed engine, module) of the causal language model in a folder or on the hub.

    `ds_config` is a ZeRO-3 JSON without a precision section. The engine returns hidden states.
    Raises ValueError for checkpoints that cannot be sharded, the same on every rank.
    """
    settings = engine_settings(ds_config)
    return shard(*open_checkpoint(name, attn_implementation, dtype), settings)


def shard(model: PreTrainedModel, slots: list[Slot], files: TensorFiles, settings: dict):
    """(DeepSpeed engine, module) of what `open_checkpoint` has opened."""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    # Not entered as a context: that would cast every float tensor made inside (rotary frequencies,
    # scales), replace F.linear for good, and send every whole tensor from rank 0 to the others.
    zero = deepspeed.zero.Init(config_dict_or_path=settings, dtype=model.dtype)

    def read_shard(slot: Slot) -> nn.Parameter:
        parameter = torch.empty_like(slot.parameter, device=zero.local_device)
        parameter = nn.Parameter(parameter, requires_grad=False)
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()
        own = parameter.ds_tensor.data  # flat, ceil(numel / ranks) numbers, padded at the end
        first, count = own_range(parameter.ds_numel, own.numel(), dist.get_rank())
        files.read_range(slot.stored, first, own[:count])
        own[count:].zero_()
        return parameter

    fill_model(slots, files, read_shard, 1 / dist.get_world_size())
    to_device(model, zero.local_device)
    backbone_only(model)
    # A block is gathered whole, by one hook: so it may run over many micro-batches at one gather,
    # and the trace of modules is the same however many they are.
    for block in decoder_blocks(model):
        set_z3_leaf_module(block, True)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine, model


def own_range(numbers: int, size: int, rank: int) -> tuple[int, int]:
    """(first, count) of a tensor's numbers in a rank's shard of `size`; behind them is padding."""
    first = rank * size
    return first, min(max(numbers - first, 0), size)


def load_unsharded(
    name: str, attn_implementation: str, dtype: str, device: torch.device
) -> PreTrainedModel:
    """The frozen CausalLM with the layers of `load_sharded`, whole in this process."""
    model, slots, files = open_checkpoint(name, attn_implementation, dtype)

    def read_whole(slot: Slot) -> nn.Parameter:
        whole = torch.empty_like(slot.parameter, device=device)
        files.read_range(slot.stored, 0, whole.view(-1))
        return nn.Parameter(whole, requires_grad=False)

    fill_model(slots, files, read_whole, 1.0)
    to_device(model, device)
    if (files.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.folder)
    return model


def open_checkpoint(
    name: str, attn_implementation: str, dtype: str
) -> tuple[PreTrainedModel, list[Slot], TensorFiles]:
    """The model without its tensors, the places for them, and the files that hold them."""
    folder = checkpoint_folder(name)
    with error_on_every_rank():
        config = AutoConfig.from_pretrained(folder, attn_implementation=attn_implementation)
        check_readable(config, name)
        files = TensorFiles(folder)
        with without_zero_init():
            kept = config.dtype if dtype == "auto" else getattr(torch, dtype)
            model, slots = empty_model(config, files, kept or torch.float32)
    return model, slots, files


def checkpoint_folder(name: str) -> Path:
    """The folder itself, or the hub's files, downloaded by one process a machine."""
    if Path(name).is_dir():
        return Path(name)
    with error_on_every_rank():
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            snapshot_download(name, allow_patterns=CHECKPOINT_FILES)
    return Path(snapshot_download(name, local_files_only=True, allow_patterns=CHECKPOINT_FILES))


def fill_model(
    slots: list[Slot], files: TensorFiles, read: Callable[[Slot], nn.Parameter], share: float
) -> None:
    """Read every slot; `share` of the bytes are this rank's."""
    total = share * sum(files.tensors[slot.stored].bytes for slot in slots)
    shown = tqdm(
        total=round(total),
        desc="streaming the teacher",
        unit="B",
        unit_scale=True,
        disable=is_distributed() and dist.get_rank() != 0,
    )
    with shown, error_on_every_rank():
        for slot in slots:
            slot.put(read(slot))
            shown.update(files.bytes_read - shown.n)
    note_unread(files)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move the buffers, which are computed on the CPU on every machine."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def note_unread(files: TensorFiles) -> None:
    """Nothing is left out in silence."""
    unread = [key for key in files.unread() if not key.endswith(COMPUTED)]
    if unread and not (is_distributed() and dist.get_rank()):
        print(
            f"note: {files.folder}: {len(unread)} tensors of its files have no place in the model and were "
            f"not read: {', '.join(unread[:5])}{', ...' if len(unread) > 5 else ''}",
            flush=True,
        )


@contextlib.contextmanager
def error_on_every_rank() -> Iterator[None]:
    """What goes wrong on one rank inside is raised on all: none waits for another for ever."""
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    errors = [error and str(error)]
    if is_distributed():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error and str(error))
    for rank, text in enumerate(errors):
        if text:
            raise ValueError(text if rank == 0 else f"{text} (rank {rank})") from error


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


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
