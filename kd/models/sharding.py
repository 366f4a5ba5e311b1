"""Stream a frozen model from disk: sharded by ZeRO-3, or whole on each rank.

All ranks share the shards, or those of each node share a set of their own. A rank reads only its
byte range of each tensor and never holds more than its shard and one tensor. Packed tensors (AWQ,
NF4, GPTQ) are sharded in their packed form, so a 4-bit teacher costs a rank its file size / ranks,
plus the layer in use.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import transformers.integrations.deepspeed as integration
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kd.distributed import all_gather, raise_on_all_ranks, rank
from kd.model_files import read_json
from kd.models.attention import use_present_kernels
from kd.models.blocks import decoder_blocks
from kd.models.heads import backbone_only
from kd.models.quantized import StoredParameter, check_readable, empty_model
from kd.models.tensor_files import TensorFiles
from kd.pretrained import load_config, load_generation_config, model_folder, tell_unread
from kd.settings.machine_file import repository_file

# Keys of ZeRO-3 that keep second, regrouped or quantized shards.
SECONDARY = (
    "zero_hpz_partition_size",
    "mics_shard_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
)


def load_sharded(
    name: str, ds_config: str, over: str, attn_implementation: str, dtype: str = "auto"
) -> tuple[Any, PreTrainedModel]:
    """Collective: load a causal language model, sharded, from a folder or the hub.

    `ds_config` is the path of a ZeRO-3 JSON without a precision section. `over` is "all" or "node":
    the ranks that share the shards.

    Returns:
        The DeepSpeed engine, whose forward returns hidden states (B, T, H), and its module.

    Raises ValueError, the same on every rank, for checkpoints that cannot be sharded.
    """
    settings = engine_settings(ds_config)
    return shard(*open_checkpoint(name, attn_implementation, dtype), settings, over)


def shard(
    model: PreTrainedModel,
    parameters: list[StoredParameter],
    files: TensorFiles,
    settings: dict,
    over: str = "all",
) -> tuple[Any, PreTrainedModel]:
    """Collective: fill a model from `open_checkpoint` and return (DeepSpeed engine, module).

    Raises ValueError on every rank if one of them cannot read its part of the files.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import set_z3_leaf_module

    device = torch.device(get_accelerator().current_device_name())
    # Init is not entered as a context: that would cast every float tensor created inside (rotary
    # frequencies, scales), replace F.linear for good, and broadcast whole tensors from rank 0.
    zero = deepspeed.zero.Init(
        config_dict_or_path=settings,
        dtype=model.dtype,
        data_parallel_group=node_group(device) if over == "node" else None,
    )

    def read_shard(stored: StoredParameter) -> nn.Parameter:
        parameter = torch.empty_like(stored.parameter, device=zero.local_device)
        parameter = nn.Parameter(parameter, requires_grad=False)
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()
        local = parameter.ds_tensor.data  # flat, ceil(numel / ranks) numbers, padded at the end
        first, count = shard_range(parameter.ds_numel, local.numel(), zero.rank)
        files.read_range(stored.name, first, local[:count])
        local[count:].zero_()
        return parameter

    fill_model(parameters, files, read_shard, 1 / zero.dp_world_size)
    move_buffers(model, zero.local_device)
    backbone_only(model)
    # As a leaf module, a block is gathered whole by one hook. So it can run over many
    # micro-batches per gather, and DeepSpeed's module trace does not depend on their number.
    for block in decoder_blocks(model):
        set_z3_leaf_module(block, True)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine, model


def node_group(device: torch.device) -> dist.ProcessGroup:
    """Collective: the group of the ranks of this node, for tensors on `device`."""
    own = os.environ  # torchrun and accelerate number the nodes, SLURM those of its tasks
    nodes = all_gather(own.get("GROUP_RANK") or own.get("SLURM_NODEID") or socket.gethostname())
    members = {node: [r for r, other in enumerate(nodes) if other == node] for node in nodes}
    # Without `timeout` the groups would have torch's default instead of that of the run.
    timeout = dist.group.WORLD._get_backend(device).options._timeout
    # Every rank must take part in the creation of all groups.
    groups = {node: dist.new_group(ranks, timeout) for node, ranks in members.items()}
    return groups[nodes[rank()]]


def shard_range(numel: int, shard_size: int, rank: int) -> tuple[int, int]:
    """(first, count) of a tensor's numbers in the shard of `rank`; the rest of it is padding."""
    first = rank * shard_size
    return first, min(max(numel - first, 0), shard_size)


def load_unsharded(
    name: str, attn_implementation: str, dtype: str, device: torch.device
) -> PreTrainedModel:
    """Load the frozen CausalLM whole in this process, with the layers of `load_sharded`.

    Raises ValueError for checkpoints that cannot be read.
    """
    model, parameters, files = open_checkpoint(name, attn_implementation, dtype)

    def read_whole(stored: StoredParameter) -> nn.Parameter:
        whole = torch.empty_like(stored.parameter, device=device)
        files.read_range(stored.name, 0, whole.view(-1))
        return nn.Parameter(whole, requires_grad=False)

    fill_model(parameters, files, read_whole, 1.0)
    move_buffers(model, device)
    if (files.folder / "generation_config.json").is_file():
        model.generation_config = load_generation_config(files.folder)
    return model


def open_checkpoint(
    name: str, attn_implementation: str, dtype: str
) -> tuple[PreTrainedModel, list[StoredParameter], TensorFiles]:
    """Collective: build the model on the meta device and find its tensors in the files.

    Raises ValueError on every rank if the checkpoint cannot be read on one of them.
    """
    use_present_kernels()
    with raise_on_all_ranks():
        folder = model_folder(name)
        config = load_config(folder, attn_implementation=attn_implementation)
        check_readable(config, name)
        files = TensorFiles(folder)
        with without_zero_init():
            kept = config.dtype if dtype == "auto" else getattr(torch, dtype)
            model, parameters = empty_model(config, files, kept or torch.float32)
    return model, parameters, files


def fill_model(
    parameters: list[StoredParameter],
    files: TensorFiles,
    read: Callable[[StoredParameter], nn.Parameter],
    share: float,
) -> None:
    """Collective: read every parameter; this rank reads the fraction `share` of the bytes.

    Raises ValueError on every rank if one of them cannot read.
    """
    total = share * sum(files.tensors[stored.name].bytes for stored in parameters)
    progress = tqdm(
        total=round(total),
        desc="streaming the teacher",
        unit="B",
        unit_scale=True,
        disable=rank() != 0,
    )
    with progress, raise_on_all_ranks():
        for stored in parameters:
            stored.assign(read(stored))
            progress.update(files.bytes_read - progress.n)
    tell_unread(files.folder, files.unread())


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move all buffers to `device`; they were computed on the CPU, the same on every machine."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@contextlib.contextmanager
def without_zero_init() -> Iterator[None]:
    """Hide the student's ZeRO-3 config, with which Transformers would shard any model it loads."""
    hidden = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = hidden


def engine_settings(ds_config: str) -> dict:
    """Read the teacher's ZeRO-3 JSON and add the batch size that DeepSpeed requires.

    Raises ValueError for other ZeRO stages and for precision sections.
    """
    settings = read_json(repository_file(ds_config), "wanted a DeepSpeed configuration")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ValueError(f"teacher_deepspeed: {ds_config} has ZeRO stage {stage}; wanted 3")
    for key in SECONDARY:
        value = settings["zero_optimization"].get(key, 1)
        if value is True or value not in (False, 1, -1):  # True equals 1
            raise ValueError(
                f"teacher_deepspeed: {ds_config} has {key}, with which DeepSpeed reads a frozen "
                "model as garbage; remove it (teacher_sharded_over: node keeps the shards of the "
                "teacher within each node)"
            )
    for precision in ("bf16", "fp16"):
        if precision in settings:
            raise ValueError(
                f"teacher_deepspeed: {ds_config} has a {precision} section, which would cast the "
                "teacher's tensors; remove it (every tensor keeps the type of its file)"
            )
    return settings | {"train_micro_batch_size_per_gpu": 1}
