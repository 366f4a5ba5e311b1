"""Memory of a student's weights, gradients and optimizer under DDP and ZeRO ("model states").

See ZeRO (Rajbhandari et al. 2020), section 3; the buffers follow the source of DeepSpeed 0.19. All
sizes are in bytes per process.
"""

import math

from kd.planning.blueprint import StoredTensor
from kd.planning.layout import Layout
from kd.planning.model_sizes import config_of

# Bytes of optimizer state per trained weight. Adam: two float32 moments; in 8 bits, two bytes and a
# float32 scale per 256 numbers for each moment.
STATES = {"adamw_8bit": 2 + 8 / 256, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0, "adamw": 8.0}

ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2}  # by DeepSpeed's names


def state_bytes(optimizer: str) -> float:
    """Bytes of optimizer state per trained weight, for a name of Transformers' `optim`."""
    if "8bit" in optimizer:
        return STATES["adamw_8bit"]
    return next((size for name, size in STATES.items() if name in optimizer), STATES["adamw"])


def zero_setting(layout: Layout, key: str, per_width: float, power: int = 1) -> int:
    """A number of the student's DeepSpeed JSON.

    Transformers replaces "auto" by `per_width` * hidden_size ** `power`.
    """
    value = layout.zero["zero_optimization"].get(key, "auto")
    width = config_of(layout.student).get_text_config().hidden_size
    return int(per_width * width**power) if value == "auto" else int(value)


def weights_held(layout: Layout, tensors: list[StoredTensor]) -> dict[str, float]:
    """The student's frozen and trained weights."""
    shards = layout.processes if layout.stage == 3 else 1
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10) if shards > 1 else 0

    def held(chosen: list[StoredTensor]) -> float:
        return sum(shard_bytes(tensor, shards, small) for tensor in chosen)

    kind = {"nf4": "NF4, the rest "}.get(layout.model.quantization, "") + layout.model.dtype
    share = f"1/{shards} per process" if shards > 1 else "whole"
    parts = {
        f"student: frozen weights ({kind}, {share})": held([t for t in tensors if not t.trained])
    }
    name = "adapters" if layout.model.lora_rank else f"student: weights ({kind}, {share})"
    return parts | {name: held([t for t in tensors if t.trained])}


def shard_bytes(tensor: StoredTensor, shards: int, small: int) -> float:
    """A process's part of a tensor under ZeRO-3; tensors of at most `small` numbers stay whole."""
    if shards == 1 or tensor.replicated:
        return tensor.bytes
    held = math.ceil(tensor.numel / shards) * tensor.itemsize
    return held + (tensor.bytes if tensor.numel <= small else 0)


def optimizer_held(layout: Layout, tensors: list[StoredTensor]) -> dict[str, float]:
    """Float32 copies, optimizer states and gradients; ZeRO shards them from stage 1 on."""
    trained = [tensor for tensor in tensors if tensor.trained]
    count = sum(tensor.numel for tensor in trained)
    size = sum(tensor.bytes for tensor in trained)
    shards = layout.processes if layout.stage else 1
    copied = layout.stage in (1, 2) or (layout.stage == 3 and bool(layout.half))
    copies = 4 * count / shards if copied else 0
    states = state_bytes(layout.optimizer) * count / shards
    on_host = layout.optimizer.startswith("paged") and layout.device == "cuda"
    buckets = size if layout.stage == 0 and layout.processes > 1 else 0
    share = f" (1/{shards} per process)" if shards > 1 else ""
    return {
        f"float32 copies of trained weights{share}": copies,
        f"optimizer: {layout.optimizer}{share}": 0 if on_host else states,
        "DDP's buckets": buckets,
        "gradients": gradient_bytes(layout, tensors) if gradients_persist(layout) else 0,
    }


def ddp_broadcast(tensors: list[StoredTensor]) -> float:
    """DDP's initial broadcast of all weights, frozen ones too, at most two buckets at a time."""
    return min(sum(tensor.bytes for tensor in tensors), 2 * 250 * 2**20)


def accumulated_itemsize(layout: Layout) -> int | None:
    """Bytes of a number of the sums over micro-batches; None: as that of the weight."""
    return ITEMSIZES.get((layout.zero or {}).get("data_types", {}).get("grad_accum_dtype"))


def sent_itemsize(layout: Layout) -> int | None:
    """Bytes of a number of the sums over processes; None: as that of the weight."""
    return ITEMSIZES.get((layout.zero or {}).get("communication_data_type"))


def numbers_bytes(tensors: list[StoredTensor], itemsize: int | None) -> float:
    """Bytes of all trained numbers, if each takes `itemsize`; None: as that of its weight."""
    return sum(tensor.numel * (itemsize or tensor.itemsize) for tensor in tensors if tensor.trained)


def gradient_bytes(layout: Layout, tensors: list[StoredTensor]) -> float:
    """Accumulated gradients of all trained weights; sharded from stage 2 on."""
    size = numbers_bytes(tensors, accumulated_itemsize(layout))
    return size / (layout.processes if layout.stage >= 2 else 1)


def own_gradients(layout: Layout, tensors: list[StoredTensor]) -> float:
    """Gradients of a micro-batch that ZeRO-2 keeps until the end of its backward.

    They are those of a process's own part, which it has added to sums of another type.
    """
    size = numbers_bytes(tensors, None)
    apart = size != numbers_bytes(tensors, accumulated_itemsize(layout))
    return size / layout.processes if layout.stage == 2 and apart else 0.0


def gradients_persist(layout: Layout) -> bool:
    """Whether gradients exist in the forward pass: ZeRO-3, or accumulation over micro-batches."""
    return layout.accumulation > 1 or layout.stage == 3


def gathered_student(layout: Layout, tensors: list[StoredTensor]) -> float:
    """Weights that ZeRO-3 keeps gathered because their next use is near.

    stage3_max_reuse_distance counts fetched numbers, so a small student stays gathered as a whole
    between its forward and its backward.
    """
    if layout.stage != 3 or layout.processes == 1:
        return 0.0
    zero = layout.zero["zero_optimization"]
    reuse = zero.get("stage3_max_reuse_distance", 1e9) / (3 if layout.checkpointing else 2)
    prefetch = zero_setting(layout, "stage3_prefetch_bucket_size", 0.9, 2)
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10)
    sharded = [t for t in tensors if not t.replicated and t.numel > small]
    largest = max((t.numel for t in sharded), default=0)
    numbers = min(sum(t.numel for t in sharded), reuse + prefetch + largest)
    return numbers * max((t.itemsize for t in sharded), default=0)


def gradient_buffers(layout: Layout, tensors: list[StoredTensor]) -> float:
    """Gradients before their reduction: DeepSpeed's buckets, and copies of the largest weight."""
    trained = [tensor for tensor in tensors if tensor.trained]
    if not layout.stage or not trained:
        return 0.0
    itemsize = max(tensor.itemsize for tensor in trained)
    sent = sent_itemsize(layout) or itemsize
    bucket = min(zero_setting(layout, "reduce_bucket_size", 1, 2), sum(t.numel for t in trained))
    buckets = 2 if layout.zero["zero_optimization"].get("overlap_comm") else 1
    reduced = max(bucket, *(tensor.numel for tensor in trained))
    # ZeRO-3 has its buckets in the type that is sent, and casts gradients before it joins them.
    size = buckets * bucket * (sent if layout.stage == 3 else itemsize)
    casts = (2 if layout.stage == 3 else 1) * reduced * sent if sent != itemsize else 0
    return size + 2 * max(tensor.bytes for tensor in trained) + casts


def step_phase(layout: Layout, tensors: list[StoredTensor]) -> dict[str, float]:
    """The optimizer's step: DeepSpeed flattens and casts gradients, with a norm in float64."""
    trained = [tensor for tensor in tensors if tensor.trained]
    parts = {} if gradients_persist(layout) else {"gradients": gradient_bytes(layout, tensors)}
    if not layout.stage:
        return parts
    count = sum(tensor.numel for tensor in trained) / layout.processes
    flat = sum(t.bytes for t in trained) / layout.processes if layout.stage < 3 else 0
    wide = 4 * count if layout.half else 0
    if own_gradients(layout, tensors):  # the sums are flat and in float32 from the start
        flat = wide = 0
    largest = max(t.numel for t in trained) / (layout.processes if layout.stage == 3 else 1)
    return parts | {"gradients, flat and in float32": max(flat + wide, 8 * largest)}
