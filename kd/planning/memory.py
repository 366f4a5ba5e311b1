"""The memory plan: bytes that a process needs in the worst phase of a step, part by part.

Weights are counted from configurations (blueprint.py) and activations by tracing the student's code
on fake tensors (activations.py), so nothing is loaded.
B batch, T tokens, N target tokens, H hidden, V vocabulary.
"""

import math
from dataclasses import replace

import torch

from kd.losses import elementwise
from kd.losses.fused import PIECE_BYTES, tile_tokens
from kd.losses.head import padded_width
from kd.models.generation_mode import row_bytes
from kd.planning.blueprint import StoredTensor
from kd.planning.layout import GIB, Layout, Plan
from kd.planning.model_sizes import activations, config_of, student_tensors, teacher_tensors
from kd.planning.model_states import (
    ddp_broadcast,
    gathered_student,
    gradient_buffers,
    gradient_bytes,
    gradients_persist,
    optimizer_held,
    own_gradients,
    state_bytes,
    step_phase,
    weights_held,
)
from kd.planning.teacher_memory import offloads, teacher_held, teacher_phase, teacher_states

# Stated allowances, not measured: the CUDA context with cuBLAS's workspaces, NCCL's buffers if
# there are several processes, and memory that the allocator cannot use because it is fragmented.
CUDA_CONTEXT, NCCL, FRAGMENTATION = 0.6 * GIB, 0.6 * GIB, 0.04
CPU_PROCESS = 0.6 * GIB  # PyTorch, Transformers, DeepSpeed and gloo before a model is loaded


def plan_training(layout: Layout) -> Plan:
    """Plan the memory of a training run.

    Raises ValueError if a configuration cannot be read or its format is unknown.
    """
    student = student_tensors(layout)
    held = weights_held(layout, student) | optimizer_held(layout, student) | teacher_held(layout)
    phases = {"the teacher's forward": teacher_phase(layout)} if layout.teacher else {}
    if layout.on_policy:
        phases["the student's generation"] = generation_phase(layout, student)
    phases |= student_phases(layout, student)
    phases["the optimizer's step"] = step_phase(layout, student)
    if layout.stage == 0 and layout.processes > 1:
        phases["DDP's start"] = {"broadcast of all weights": ddp_broadcast(student)}
    held |= overhead(layout, sum(held.values()) + max(sum(p.values()) for p in phases.values()))
    return Plan(layout, held, phases, host_parts(layout, student))


def plan_scoring(layout: Layout) -> Plan:
    """Plan the memory of a teacher that fills a cache, without a student.

    Compared with the loss of a training run it keeps one more distribution: that of the batch which
    it scores.
    """
    held = teacher_held(layout)
    phases = {"the teacher's forward": teacher_phase(layout)}
    phases["the top-k selection"] = {"tiles of logits": loss_workspace(layout)}
    held |= overhead(layout, sum(held.values()) + max(sum(p.values()) for p in phases.values()))
    return Plan(layout, held, phases, host_parts(layout, []))


def overhead(layout: Layout, allocated: float) -> dict[str, float]:
    """Allowances on top of `allocated` bytes."""
    if layout.device != "cuda":
        return {"PyTorch, DeepSpeed, gloo (allowance)": CPU_PROCESS}
    nccl = NCCL if layout.processes > 1 else 0.0
    return {
        "CUDA context, NCCL (allowance)": CUDA_CONTEXT + nccl,
        f"fragmentation (allowance, {FRAGMENTATION:.0%})": FRAGMENTATION * allocated,
    }


def student_phases(layout: Layout, tensors: list[StoredTensor]) -> dict[str, dict[str, float]]:
    """The loss, at the end of the forward, and the backward."""
    text = config_of(layout.student).get_text_config()
    traced = activations(layout.student, layout)
    gathered = {"student's gathered layers": gathered_student(layout, tensors)}
    itemsize = getattr(torch, layout.half or layout.model.dtype).itemsize
    states = layout.tokens * text.hidden_size  # numbers of (N, H); every token may be a target
    head = trained_head(layout)
    loss = {
        # If data and on-policy rows share a micro-batch, each forms a gradient of the head.
        "gradient of the loss (float32)": 4 * states + 4 * head * (2 if layout.on_policy else 1),
        "hidden states at targets": itemsize * states,
    }
    forward = {"activations": max(traced.kept, traced.forward), **gathered, **loss}
    forward["loss workspace"] = loss_workspace(layout)
    if layout.teacher:
        teacher = config_of(layout.teacher).get_text_config()
        width = teacher.hidden_size
        size = (config_of(layout.teacher).dtype or torch.float32).itemsize
        waiting = teacher_states(layout)
        forward["teacher's hidden states"] = waiting
        if layout.hidden_pairs:
            numbers = layout.hidden_pairs * layout.tokens * (width + text.hidden_size)
            forward["hidden-state loss"] = numbers * (size + 4)
        if layout.teacher_shards is not None:
            forward["teacher's gathered head"] = teacher.vocab_size * width * size
    backward = {"activations": max(traced.kept, traced.backward), **gathered, **loss}
    if layout.teacher and layout.teacher_shards is not None:
        backward["teacher's hidden states"] = waiting
        gathered_head = forward["teacher's gathered head"]
        if waiting + gathered_head <= layout.teacher_workspace:  # it stays gathered
            backward["teacher's gathered head"] = gathered_head
    backward["gradient reduction buffers"] = gradient_buffers(layout, tensors)
    # Gradients grow while the activations are freed.
    grown = own_gradients(layout, tensors)
    if not gradients_persist(layout):
        grown += gradient_bytes(layout, tensors)
    freed = backward["activations"]
    backward["gradients beyond the freed activations"] = max(0.0, grown - freed)
    return {"the loss": forward, "the backward": backward}


def generation_phase(layout: Layout, tensors: list[StoredTensor]) -> dict[str, float]:
    """On-policy generation: the key-value cache of a batch; ZeRO-3 gathers the whole student.

    The first forward reads all prompts of the batch, which are longest if answers are short.
    """
    row = on_policy_row_bytes(layout)
    workspace = 2**20 * layout.on_policy.generation_workspace_mb
    rows = min(on_policy_rows(layout), max(1, workspace // row))
    prompts = replace(layout, micro=rows, packing=False)
    dtype = getattr(torch, layout.half or layout.model.dtype)
    whole = sum(tensor.bytes for tensor in tensors)
    sharded = layout.stage == 3 and layout.processes > 1
    return {
        "keys, values and scores of generated answers": rows * row,
        "activations of the prompts": activations(
            layout.student, prompts, gradients=False, dtype=dtype
        ).forward,
        "student gathered for generation": whole if sharded else 0.0,
    }


def on_policy_rows(layout: Layout) -> int:
    """Most rows of a step that one process generates: all chosen ones may be its own."""
    mine = layout.micro * layout.accumulation
    return min(mine, math.ceil(layout.on_policy.student_fraction * mine * layout.processes))


def on_policy_row_bytes(layout: Layout) -> int:
    """Keys, values and scores of one generated row."""
    itemsize = getattr(torch, layout.half or layout.model.dtype).itemsize
    return row_bytes(config_of(layout.student), layout.max_length, itemsize)


def trained_head(layout: Layout) -> int:
    """Numbers of the head if it is trained, else 0; the loss computes its gradient."""
    if layout.model.lora_rank:
        return 0
    text = config_of(layout.student).get_text_config()
    return text.vocab_size * text.hidden_size


def loss_workspace(layout: Layout) -> float:
    """The loss's tiles of logits and their buffers, as kd.losses.fused allocates them."""
    vocab_size = padded_width(config_of(layout.student).get_text_config().vocab_size)
    exact, kinds = torch.float32, product_dtypes(layout)
    half, tokens = kinds[0], loss_tile(layout)
    size = tokens * vocab_size * (4 * len(kinds) + (half.itemsize if half != exact else 0))
    if layout.device == "cuda":
        return size
    block = max(elementwise.BLOCK_ELEMENTS, vocab_size) * exact.itemsize
    pieces = 2 * PIECE_BYTES if layout.half else 0
    return size + (elementwise.SCRATCH + 1) * block + pieces


def product_dtypes(layout: Layout) -> list[torch.dtype]:
    """The dtypes of the heads' products, the student's first."""
    half = layout.half if layout.device == "cuda" else None
    return [getattr(torch, half or "float32")] * (2 if layout.teacher else 1)


def loss_tile(layout: Layout) -> int:
    """Tokens in a tile of the loss."""
    vocab_size = config_of(layout.student).get_text_config().vocab_size
    kinds, device = product_dtypes(layout), torch.device(layout.device)
    most = tile_tokens(layout.objective, vocab_size, torch.float32, kinds, device)
    return min(most, layout.tokens)


def host_parts(layout: Layout, tensors: list[StoredTensor]) -> dict[str, float]:
    """Host memory of a machine: libraries, weights while they are loaded, and what is offloaded."""
    processes = layout.local_processes
    parts = {"libraries": processes * 2.5 * GIB}
    if layout.model.quantization == "none":
        parts["student while it is loaded"] = processes * sum(t.bytes for t in tensors)
    if layout.teacher and offloads(layout.teacher_shards):
        size = sum(tensor.bytes for tensor in teacher_tensors(layout))
        parts["teacher's shards"] = size * processes / layout.teacher_group
    if layout.optimizer.startswith("paged"):
        count = sum(tensor.numel for tensor in tensors if tensor.trained)
        shards = layout.processes if layout.stage else 1
        parts["paged optimizer"] = processes * state_bytes(layout.optimizer) * count / shards
    return parts
