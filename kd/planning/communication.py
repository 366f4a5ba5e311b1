"""Bytes that a process sends in one step, as DDP and DeepSpeed 0.19 do on a ring.

benchmarks/scale.py compares these formulas with the collectives of real runs.
"""

import torch

from kd.planning.blueprint import StoredTensor
from kd.planning.layout import Layout
from kd.planning.model_sizes import config_of, student_tensors, teacher_tensors
from kd.planning.model_states import zero_setting


def sent_bytes(layout: Layout) -> dict[str, float]:
    """Bytes that one process sends in one step, by purpose."""
    share, steps = (layout.processes - 1) / layout.processes, layout.accumulation
    tensors = student_tensors(layout)
    trained = sum(tensor.bytes for tensor in tensors if tensor.trained)
    # ZeRO-2 reduces whole buckets on every rank, although each keeps only a part, and it does so
    # in every micro-batch.
    times = {0: 2, 1: 2, 2: 2 * steps, 3: steps}[layout.stage]
    sent = {"gradients": share * times * trained}
    if layout.stage in (1, 2):
        sent["updated weights"] = share * trained
    if layout.stage == 3:
        sent["student's shards"] = share * steps * gathered_bytes(layout, tensors)
    if layout.teacher and layout.teacher_shards is not None:
        sent["teacher's shards"] = share * gathered_teacher_bytes(layout)
    if layout.on_policy and layout.stage == 3:
        sent["student gathered for generation"] = share * sharded_bytes(tensors)
    return sent


def gathered_bytes(layout: Layout, tensors: list[StoredTensor]) -> float:
    """Bytes of the student that ZeRO-3 gathers in a micro-batch.

    Every block is gathered for the forward and for the backward. With adapters, a checkpointed
    block is also gathered for its second forward; a trained one stays gathered from there on (if
    two blocks have at most stage3_max_reuse_distance numbers). The head stays gathered from its
    forward to its backward, and so do the blocks within that distance of the head. Frozen
    embeddings have no backward.
    """
    lora = layout.model.lora_rank > 0
    text = config_of(layout.student).get_text_config()
    table = text.vocab_size * text.hidden_size
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10)
    sharded = [tensor for tensor in tensors if not tensor.replicated and tensor.numel > small]
    tables = [tensor.itemsize for tensor in sharded if tensor.numel == table]
    blocks = [tensor for tensor in sharded if tensor.numel != table]
    reuse = layout.zero["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
    near = max(0.0, reuse / (3 if layout.checkpointing else 2) - table)
    stays = min(1.0, near / max(1, sum(tensor.numel for tensor in blocks)))
    passes = 3 if lora and layout.checkpointing else 2
    times = 1 + (1 if lora or stays == 1.0 else 2)  # the head's, the embeddings'
    return (passes - stays) * sum(t.bytes for t in blocks) + times * table * max(tables, default=0)


def gathered_teacher_bytes(layout: Layout) -> float:
    """Bytes of a sharded teacher that are gathered in a step.

    Its blocks are gathered once per group of micro-batches whose states fit the workspace. Its head
    is gathered once per group if it fits as well, else once per micro-batch.
    """
    config = config_of(layout.teacher)
    width, size = config.get_text_config().hidden_size, (config.dtype or torch.float32).itemsize
    states = (2 + layout.hidden_pairs) * layout.tokens * width * size
    at_once = min(layout.accumulation, max(1, layout.teacher_workspace // states))
    passes = -(-layout.accumulation // at_once)
    head = config.get_text_config().vocab_size * width * size
    keeps_head = at_once * states + head <= layout.teacher_workspace
    heads = passes if keeps_head else layout.accumulation
    return passes * (sharded_bytes(teacher_tensors(layout)) - head) + heads * head


def sharded_bytes(tensors: list[StoredTensor]) -> float:
    """Bytes of the tensors that ZeRO-3 shards."""
    return sum(tensor.bytes for tensor in tensors if not tensor.replicated)
