"""The plan: bytes a process needs at the worst moment of a step, part by part, before anything loads.

Weights are counted from configurations (blueprint.py), activations by running the student's code
without numbers (activations.py), the buffers of DeepSpeed 0.19 from its source. B rows, T tokens,
N target tokens, H hidden, V vocabulary.
"""

import math

import torch

from kd.losses import elementwise
from kd.losses.fused import PIECE_BYTES, tile_tokens
from kd.models.generation_mode import row_bytes
from kd.planning.blueprint import Piece
from kd.planning.counts import activations, config_of, student_pieces, teacher_pieces
from kd.planning.layout import GIB, Layout, Plan

# Allowances that are stated, not measured: the CUDA context with cuBLAS's workspaces, NCCL's
# buffers where there are several processes, and what the allocator cannot use between blocks.
CUDA_CONTEXT, NCCL, FRAGMENTATION = 0.6 * GIB, 0.6 * GIB, 0.04
CPU_PROCESS = 0.6 * GIB  # PyTorch, Transformers, DeepSpeed, gloo: RssAnon before a model is loaded
# Bytes a trained weight: Adam's two moments; in 8 bits with a float32 scale for 256 of them.
STATES = {"adamw_8bit": 2 + 8 / 256, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0, "adamw": 8.0}


def plan(layout: Layout) -> Plan:
    """Raises ValueError where a configuration cannot be read or a format is not known."""
    student = student_pieces(layout)
    held = weights_held(layout, student) | optimizer_held(layout, student)
    held |= teacher_held(layout)
    phases = {"the teacher's forward": teacher_phase(layout)} if layout.teacher else {}
    phases |= {"the student's writing": writing_phase(layout, student)} if layout.on_policy else {}
    phases |= student_phases(layout, student)
    phases["the optimizer's step"] = step_phase(layout, student)
    if layout.stage == 0 and layout.processes > 1:
        phases["DDP's start"] = {"weights on their way to all": ddp_broadcast(student)}
    held |= overhead(layout, sum(held.values()) + max(sum(p.values()) for p in phases.values()))
    return Plan(layout, held, phases, host_parts(layout, student))


def scoring_plan(layout: Layout) -> Plan:
    """Of a teacher that fills a cache, with no student beside it.

    It keeps one distribution more than a training's loss does: that of the batch it scores.
    """
    held = teacher_held(layout)
    phases = {"the teacher's forward": teacher_phase(layout)}
    phases["the choice of the top k"] = {"tiles of logits": loss_workspace(layout)}
    held |= overhead(layout, sum(held.values()) + max(sum(p.values()) for p in phases.values()))
    return Plan(layout, held, phases, host_parts(layout, []))


def overhead(layout: Layout, allocated: float) -> dict[str, float]:
    if layout.device != "cuda":
        return {"PyTorch, DeepSpeed, gloo (allowance)": CPU_PROCESS}
    nccl = NCCL if layout.processes > 1 else 0.0
    return {
        "CUDA context, NCCL (allowance)": CUDA_CONTEXT + nccl,
        f"fragmentation (allowance, {FRAGMENTATION:.0%})": FRAGMENTATION * allocated,
    }


def weights_held(layout: Layout, pieces: list[Piece]) -> dict[str, float]:
    shards = layout.processes if layout.stage == 3 else 1
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10) if shards > 1 else 0

    def held(chosen: list[Piece]) -> float:
        return sum(shard(piece, shards, small) for piece in chosen)

    kind = {"nf4": "NF4, the rest "}.get(layout.model.quantization, "") + layout.model.dtype
    whole = f"1/{shards} of it" if shards > 1 else "whole"
    parts = {
        f"student: frozen weights ({kind}, {whole})": held([p for p in pieces if not p.trained])
    }
    name = "adapters" if layout.model.lora_rank else f"student: weights ({kind}, {whole})"
    return parts | {name: held([p for p in pieces if p.trained])}


def shard(piece: Piece, shards: int, small: int) -> float:
    """Bytes of a tensor under ZeRO-3; those of at most `small` numbers are kept whole as well."""
    if shards == 1 or piece.replicated:
        return piece.bytes
    held = math.ceil(piece.numel / shards) * piece.itemsize
    return held + (piece.bytes if piece.numel <= small else 0)


def zero_setting(layout: Layout, key: str, per_width: float, power: int = 1) -> int:
    """A number of the student's JSON; "auto" is what Transformers makes of the student's width."""
    value = layout.zero["zero_optimization"].get(key, "auto")
    width = config_of(layout.student).get_text_config().hidden_size
    return int(per_width * width**power) if value == "auto" else int(value)


def optimizer_held(layout: Layout, pieces: list[Piece]) -> dict[str, float]:
    """Master copies, moments and gradients; ZeRO shares them out from stage 1 on."""
    trained = [piece for piece in pieces if piece.trained]
    count = sum(piece.numel for piece in trained)
    size = sum(piece.bytes for piece in trained)
    shares = layout.processes if layout.stage else 1
    copied = layout.stage in (1, 2) or (layout.stage == 3 and bool(layout.half))
    master = 4 * count / shares if copied else 0
    states = STATES[family(layout.optimizer)] * count / shares
    on_host = layout.optimizer.startswith("paged") and layout.device == "cuda"
    buckets = size if layout.stage == 0 and layout.processes > 1 else 0
    name = f" (1/{shares})" if shares > 1 else ""
    return {
        f"float32 copies of trained weights{name}": master,
        f"optimizer: {layout.optimizer}{name}": 0 if on_host else states,
        "DDP's buckets": buckets,
        "gradients": gradient_bytes(layout, pieces) if gradients_stay(layout) else 0,
    }


def ddp_broadcast(pieces: list[Piece]) -> float:
    """DDP starts with a broadcast of all weights, frozen ones too: at most two buckets at a time."""
    return min(sum(piece.bytes for piece in pieces), 2 * 250 * 2**20)


def gradient_bytes(layout: Layout, pieces: list[Piece]) -> float:
    size = sum(piece.bytes for piece in pieces if piece.trained)
    return size / (layout.processes if layout.stage >= 2 else 1)


def gradients_stay(layout: Layout) -> bool:
    """Over an accumulation; ZeRO-3 keeps a buffer for them from the start."""
    return layout.accumulation > 1 or layout.stage == 3


def family(optimizer: str) -> str:
    if "8bit" in optimizer:
        return "adamw_8bit"
    return next((name for name in STATES if name in optimizer), "adamw")


def teacher_held(layout: Layout) -> dict[str, float]:
    if layout.teacher is None:
        return {}
    pieces = teacher_pieces(layout)
    if layout.teacher_shards is None:
        return {"teacher (whole)": sum(piece.bytes for piece in pieces)}
    zero = layout.teacher_shards["zero_optimization"]
    small = zero.get("stage3_param_persistence_threshold", 100_000)
    if offloads(layout.teacher_shards) and layout.device == "cuda":
        return {"teacher (shard in host memory)": sum(p.bytes for p in pieces if p.numel <= small)}
    held = sum(shard(piece, layout.processes, small) for piece in pieces)
    return {f"teacher (1/{layout.processes} of it)": held}


def teacher_phase(layout: Layout) -> dict[str, float]:
    """The teacher's forward: one block's activations, and of a sharded teacher what is gathered."""
    config, pieces = config_of(layout.teacher), teacher_pieces(layout)
    dtype = config.dtype if layout.teacher_dtype == "auto" else getattr(torch, layout.teacher_dtype)
    dtype = dtype or torch.float32
    traced = activations(layout.teacher, layout, gradients=False, dtype=dtype)
    parts = {
        "teacher's activations": traced.forward,
        "teacher's hidden states, kept": teacher_states(layout),
    }
    if getattr(config, "quantization_config", None):
        text = config.get_text_config()
        largest = text.hidden_size * getattr(text, "intermediate_size", 4 * text.hidden_size)
        parts["teacher's Linear while it is unpacked"] = largest * dtype.itemsize
    if layout.teacher_shards is not None:
        zero = layout.teacher_shards["zero_optimization"]
        largest = max(pieces, key=lambda piece: piece.numel)
        ahead = min(zero.get("stage3_prefetch_bucket_size", 5e7), sum(p.numel for p in pieces))
        itemsize = max((p.itemsize for p in pieces), default=2)
        # What is fetched together arrives in one buffer, and is copied from there weight by weight.
        size = min(largest.bytes + 2 * ahead * itemsize, 2 * sum(p.bytes for p in pieces))
        parts["teacher's gathered layers"] = size
    return parts


def teacher_states(layout: Layout) -> float:
    """A sharded teacher runs over as many micro-batches at once as its workspace holds states."""
    text = config_of(layout.teacher).get_text_config()
    size = (config_of(layout.teacher).dtype or torch.float32).itemsize
    one = (2 + layout.hidden_pairs) * layout.tokens * text.hidden_size * size
    if layout.teacher_shards is None:
        return one
    return max(one, min(layout.accumulation * one, layout.teacher_workspace))


def student_phases(layout: Layout, pieces: list[Piece]) -> dict[str, dict[str, float]]:
    """The end of the forward, where the loss works, and the backward."""
    text = config_of(layout.student).get_text_config()
    traced = activations(layout.student, layout)
    gathered = {"student's gathered layers": gathered_student(layout, pieces)}
    itemsize = getattr(torch, layout.half or layout.model.dtype).itemsize
    states = layout.tokens * text.hidden_size  # numbers of (N, H), every token a target
    head = trained_head(layout, pieces)
    loss = {
        # Where data and own answers share a micro-batch, each part forms a gradient of the head.
        "gradient of the loss (float32)": 4 * states + 4 * head * (2 if layout.on_policy else 1),
        "hidden states at targets": itemsize * states,
    }
    forward = {"activations": max(traced.kept, traced.forward), **gathered, **loss}
    forward["loss workspace"] = loss_workspace(layout)
    if layout.teacher:
        teacher = config_of(layout.teacher).get_text_config()
        width = teacher.hidden_size
        size = (config_of(layout.teacher).dtype or torch.float32).itemsize
        states = teacher_states(layout)
        forward["teacher's hidden states, kept"] = states
        if layout.hidden_pairs:
            numbers = layout.hidden_pairs * layout.tokens * (width + text.hidden_size)
            forward["hidden-state loss"] = numbers * (size + 4)
        if layout.teacher_shards is not None:
            forward["teacher's gathered head"] = teacher.vocab_size * width * size
    backward = {"activations": max(traced.kept, traced.backward), **gathered, **loss}
    if layout.teacher and layout.teacher_shards is not None:
        backward["teacher's hidden states, kept"] = states
        head = forward["teacher's gathered head"]
        if states + head <= layout.teacher_workspace:  # it stays gathered
            backward["teacher's gathered head"] = head
    backward["gradients on their way"] = gradient_buffers(layout, pieces)
    if not gradients_stay(layout):  # they come as the activations go
        grown = gradient_bytes(layout, pieces) - backward["activations"]
        backward["gradients beyond the activations' room"] = max(0.0, grown)
    return {"the loss": forward, "the backward": backward}


def writing_phase(layout: Layout, pieces: list[Piece]) -> dict[str, float]:
    """Own answers: keys and values of the rows that are written at once; ZeRO-3 gathers all of it."""
    row = own_row_bytes(layout)
    size = min(own_rows(layout) * row, max(row, 2**20 * layout.on_policy.generation_workspace_mb))
    whole = sum(piece.bytes for piece in pieces)
    sharded = layout.stage == 3 and layout.processes > 1
    return {
        "keys, values and scores of own answers": size,
        "student gathered to write": whole if sharded else 0.0,
    }


def own_rows(layout: Layout) -> int:
    """Rows that a process writes in a step, where all chosen ones are its own."""
    mine = layout.micro * layout.accumulation
    return min(mine, math.ceil(layout.on_policy.student_fraction * mine * layout.processes))


def own_row_bytes(layout: Layout) -> int:
    """Keys, values and scores of a row that the student writes."""
    itemsize = getattr(torch, layout.half or layout.model.dtype).itemsize
    return row_bytes(config_of(layout.student), layout.max_length, itemsize)


def trained_head(layout: Layout, pieces: list[Piece]) -> int:
    """Numbers of the head, where it is trained: its gradient is formed in the loss."""
    if layout.model.lora_rank:
        return 0
    text = config_of(layout.student).get_text_config()
    return text.vocab_size * text.hidden_size


def gathered_student(layout: Layout, pieces: list[Piece]) -> float:
    """Under ZeRO-3 a weight stays gathered if its next use is near: stage3_max_reuse_distance.

    It is counted in numbers fetched, so a small student is gathered whole between its forward and
    its backward.
    """
    if layout.stage != 3 or layout.processes == 1:
        return 0.0
    zero = layout.zero["zero_optimization"]
    reuse = zero.get("stage3_max_reuse_distance", 1e9) / (3 if layout.checkpointing else 2)
    ahead = zero_setting(layout, "stage3_prefetch_bucket_size", 0.9, 2)
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10)
    sharded = [p for p in pieces if not p.replicated and p.numel > small]
    largest = max((p.numel for p in sharded), default=0)
    numbers = min(sum(p.numel for p in sharded), reuse + ahead + largest)
    return numbers * max((p.itemsize for p in sharded), default=0)


def gradient_buffers(layout: Layout, pieces: list[Piece]) -> float:
    """Gradients between their weight and their reduction: DeepSpeed's buckets, the largest weight."""
    trained = [piece for piece in pieces if piece.trained]
    if not layout.stage or not trained:
        return 0.0
    itemsize = max(piece.itemsize for piece in trained)
    bucket = min(zero_setting(layout, "reduce_bucket_size", 1, 2), sum(p.numel for p in trained))
    buckets = 2 if layout.zero["zero_optimization"].get("overlap_comm") else 1
    return buckets * bucket * itemsize + 2 * max(piece.bytes for piece in trained)


def step_phase(layout: Layout, pieces: list[Piece]) -> dict[str, float]:
    """DeepSpeed flattens the gradients, brings them to float32, and takes their norm in float64."""
    trained = [piece for piece in pieces if piece.trained]
    parts = {} if gradients_stay(layout) else {"gradients": gradient_bytes(layout, pieces)}
    if not layout.stage:
        return parts
    count = sum(piece.numel for piece in trained) / layout.processes
    flat = sum(piece.bytes for piece in trained) / layout.processes if layout.stage < 3 else 0
    wide = 4 * count if layout.half else 0
    largest = max(piece.numel for piece in trained) / (layout.processes if layout.stage == 3 else 1)
    return parts | {"gradients, flat and in float32": max(flat + wide, 8 * largest)}


def loss_workspace(layout: Layout) -> float:
    """The loss's tile of logits and what goes with it, as kd.losses.fused allocates it."""
    vocabulary = config_of(layout.student).get_text_config().vocab_size
    exact = torch.float32
    half = getattr(torch, layout.half) if layout.half and layout.device == "cuda" else exact
    kinds = [half] * (2 if layout.teacher else 1)
    device = torch.device(layout.device)
    tokens = tile_tokens(layout.objective, vocabulary, exact, kinds, device)
    tokens = min(tokens, layout.tokens)
    size = tokens * vocabulary * (4 * len(kinds) + (half.itemsize if half != exact else 0))
    if layout.device == "cuda":
        return size
    block = max(elementwise.BLOCK_ELEMENTS, vocabulary) * exact.itemsize
    pieces = 2 * PIECE_BYTES if layout.half else 0
    return size + (elementwise.SCRATCH + 1) * block + pieces


def host_parts(layout: Layout, pieces: list[Piece]) -> dict[str, float]:
    """Beside the GPUs: a process's libraries, weights on their way, and what is offloaded."""
    processes = layout.per_machine or layout.processes
    parts = {"libraries": processes * 2.5 * GIB}
    if layout.model.quantization == "none":
        parts["student on its way"] = processes * sum(p.bytes for p in pieces)
    if layout.teacher and offloads(layout.teacher_shards):
        size = sum(piece.bytes for piece in teacher_pieces(layout))
        parts["teacher's shards"] = size * processes / layout.processes
    if layout.optimizer.startswith("paged"):
        count = sum(piece.numel for piece in pieces if piece.trained)
        shares = layout.processes if layout.stage else 1
        parts["paged optimizer"] = processes * STATES[family(layout.optimizer)] * count / shares
    return parts


def offloads(shards: dict | None) -> bool:
    return "offload_param" in (shards or {}).get("zero_optimization", {})
