"""Memory of a live teacher, whole on every process or sharded by ZeRO-3. Sizes are in bytes."""

import torch

from kd.planning.layout import Layout
from kd.planning.model_sizes import activations, config_of, teacher_tensors
from kd.planning.model_states import shard_bytes


def teacher_held(layout: Layout) -> dict[str, float]:
    """The teacher's weights on a process's device."""
    if layout.teacher is None:
        return {}
    tensors = teacher_tensors(layout)
    if layout.teacher_shards is None:
        return {"teacher (whole)": sum(tensor.bytes for tensor in tensors)}
    zero = layout.teacher_shards["zero_optimization"]
    small = zero.get("stage3_param_persistence_threshold", 100_000)
    if offloads(layout.teacher_shards) and layout.device == "cuda":
        return {"teacher (shard in host memory)": sum(t.bytes for t in tensors if t.numel <= small)}
    held = sum(shard_bytes(tensor, layout.teacher_group, small) for tensor in tensors)
    return {f"teacher (1/{layout.teacher_group} per process)": held}


def teacher_phase(layout: Layout) -> dict[str, float]:
    """The teacher's forward: one layer's activations, and a sharded teacher's gathered layers."""
    config, tensors = config_of(layout.teacher), teacher_tensors(layout)
    dtype = config.dtype if layout.teacher_dtype == "auto" else getattr(torch, layout.teacher_dtype)
    dtype = dtype or torch.float32
    traced = activations(layout.teacher, layout, gradients=False, dtype=dtype)
    parts = {
        "teacher's activations": traced.forward,
        "teacher's hidden states": teacher_states(layout),
    }
    if getattr(config, "quantization_config", None):
        text = config.get_text_config()
        largest = text.hidden_size * getattr(text, "intermediate_size", 4 * text.hidden_size)
        parts["teacher's largest Linear, unpacked"] = largest * dtype.itemsize
    if layout.teacher_shards is not None:
        zero = layout.teacher_shards["zero_optimization"]
        largest = max(tensors, key=lambda tensor: tensor.numel)
        ahead = min(zero.get("stage3_prefetch_bucket_size", 5e7), sum(t.numel for t in tensors))
        itemsize = max((t.itemsize for t in tensors), default=2)
        # Tensors that are fetched together arrive in one buffer and are copied out one by one.
        size = min(largest.bytes + 2 * ahead * itemsize, 2 * sum(t.bytes for t in tensors))
        parts["teacher's gathered layers"] = size
    return parts


def teacher_states(layout: Layout) -> float:
    """The teacher's hidden states that wait for the loss.

    A sharded teacher runs over as many micro-batches at once as its workspace holds states of.
    """
    text = config_of(layout.teacher).get_text_config()
    size = (config_of(layout.teacher).dtype or torch.float32).itemsize
    one = (2 + layout.hidden_pairs) * layout.tokens * text.hidden_size * size
    if layout.teacher_shards is None:
        return one
    return max(one, min(layout.accumulation * one, layout.teacher_workspace))


def offloads(shards: dict | None) -> bool:
    """Whether a DeepSpeed JSON keeps the weights in host memory."""
    return "offload_param" in (shards or {}).get("zero_optimization", {})
