"""How long a step takes and what a run leaves on disk: counted operations and bytes over the rates.

Nothing overlaps in this count, and a step reaches `efficiency` of the matrix rate: an assumption.
B rows, T tokens, N target tokens, H hidden, V vocabulary, P numbers in the backbone's Linears.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from kd.planning.blueprint import Piece, build
from kd.planning.counts import config_of, remembered, student_pieces, teacher_pieces
from kd.planning.layout import Layout, line
from kd.planning.memory import STATES, family, own_row_bytes, own_rows, zero_setting


@dataclass(frozen=True)
class Rates:
    """What a device can do; the vendor's figures, or measured ones."""

    tflops: float  # matrix products in the run's precision, 1e12 operations a second
    memory_gb_s: float  # read and written together, 1e9 bytes a second
    link_gb_s: float  # what a process sends to the others
    efficiency: float = 0.5


@dataclass(frozen=True)
class Duration:
    """Seconds a step, part by part."""

    seconds: dict[str, float]
    tokens: int  # all processes together

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        lines = [f"time a step of {self.tokens} tokens (modelled, nothing overlaps)"]
        lines += [f"  {name:<60}{value:8.2f} s" for name, value in self.seconds.items() if value]
        rate = f"sum: {self.tokens / self.step:,.0f} tokens/s"
        return "\n".join([*lines, f"  {rate:<60}{self.step:8.2f} s"])


def duration(layout: Layout, rates: Rates) -> Duration:
    rate = 1e12 * rates.tflops * rates.efficiency
    seconds = {name: count / rate for name, count in operations(layout).items()}
    moved = unpacked_bytes(layout) + optimizer_bytes(layout)
    seconds["unpacking weights, the optimizer"] = moved / (1e9 * rates.memory_gb_s)
    sent = sum(sent_bytes(layout).values())
    seconds["between processes"] = sent / (1e9 * rates.link_gb_s)
    if layout.on_policy:
        name = f"the student's writing (each answer {layout.on_policy.max_new_tokens} tokens long)"
        seconds[name] = writing_bytes(layout) / (1e9 * rates.memory_gb_s)
    return Duration(seconds, layout.processes * layout.tokens * layout.accumulation)


def operations(layout: Layout) -> dict[str, float]:
    """Of one process in one step; a multiplication with its addition is two."""
    tokens = layout.tokens * layout.accumulation
    forward = forward_operations(layout.student, layout, tokens)
    trained = sum(piece.numel for piece in student_pieces(layout) if piece.trained)
    lora = layout.model.lora_rank > 0
    # Frozen weights need the gradient of their inputs alone.
    backward = (forward if lora else 2 * forward) + (6 * trained * tokens if lora else 0)
    text = config_of(layout.student).get_text_config()
    products = 2 * text.hidden_size if lora else 3 * text.hidden_size
    teacher = 0.0
    if layout.teacher:
        products += config_of(layout.teacher).get_text_config().hidden_size
        teacher = forward_operations(layout.teacher, layout, tokens)
    return {
        "teacher's forward": teacher,
        "student's forward": forward,
        "student's forward again (checkpointing)": forward if layout.checkpointing else 0.0,
        "student's backward": backward,
        "heads and loss": 2 * tokens * text.vocab_size * products,
    }


def matrix_work(layout: Layout, device: torch.device) -> tuple[float, float, float] | None:
    """(operations of a position, of a target token beside that, measured matrix rate of a GPU).

    None on a CPU, whose rate is whatever the other processes leave of it.
    """
    if device.type != "cuda":
        return None
    return (*counted_work(layout), matrix_rate("cuda", getattr(torch, layout.half or "float32")))


def counted_work(layout: Layout) -> tuple[float, float]:
    """(operations of a position, of a target token beside that)."""
    counts = operations(layout)
    tokens = layout.tokens * layout.accumulation
    heads = counts.pop("heads and loss")
    return sum(counts.values()) / tokens, heads / tokens


def forward_operations(name: str, layout: Layout, tokens: int) -> float:
    """The backbone's Linears, and causal attention's two products."""
    numbers = remembered(("linears", name), lambda: numbers_of_linears(name))
    text = config_of(name).get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * layout.max_length * text.num_attention_heads * width * text.num_hidden_layers
    return tokens * (2 * numbers + attention)


def numbers_of_linears(name: str) -> int:
    """Of the backbone."""
    model = build(config_of(name), torch.float32)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(linear.weight.numel() for linear in linears)


def unpacked_bytes(layout: Layout) -> float:
    """Four-bit weights become bfloat16 at every use: half a byte read, two written, two read."""
    passes = layout.accumulation * (3 if layout.checkpointing else 2)
    moved = 0.0
    if layout.model.quantization == "nf4":
        moved += passes * 9 * sum(p.bytes for p in student_pieces(layout) if not p.trained)
    if layout.teacher and getattr(config_of(layout.teacher), "quantization_config", None):
        moved += layout.accumulation * 9 * sum(p.bytes for p in teacher_pieces(layout))
    return moved


def writing_bytes(layout: Layout) -> float:
    """Every token of own answers reads all weights once, for the rows that are written at once."""
    room = 2**20 * layout.on_policy.generation_workspace_mb
    batches = math.ceil(own_rows(layout) / max(1, room // own_row_bytes(layout)))
    weights = sum(
        piece.bytes * (9 if layout.model.quantization == "nf4" and not piece.trained else 1)
        for piece in student_pieces(layout)
    )
    return batches * min(layout.on_policy.max_new_tokens, layout.max_length) * weights


def optimizer_bytes(layout: Layout) -> float:
    trained = sum(piece.numel for piece in student_pieces(layout) if piece.trained)
    states = STATES[family(layout.optimizer)]
    return (2 * states + 16) * trained / (layout.processes if layout.stage else 1)


def sent_bytes(layout: Layout) -> dict[str, float]:
    """Of one process in one step, on a ring; benchmarks/scale.py counts what real runs send."""
    share, steps = (layout.processes - 1) / layout.processes, layout.accumulation
    pieces = student_pieces(layout)
    trained = sum(piece.bytes for piece in pieces if piece.trained)
    # ZeRO-2 reduces whole buckets on every rank, though each keeps a part, and in every micro-batch.
    times = {0: 2, 1: 2, 2: 2 * steps, 3: steps}[layout.stage]
    sent = {"gradients": share * times * trained}
    if layout.stage in (1, 2):
        sent["updated weights"] = share * trained
    if layout.stage == 3:
        sent["student's shards"] = share * steps * gathered_bytes(layout, pieces)
    if layout.teacher and layout.teacher_shards is not None:
        sent["teacher's shards"] = share * gathered_of_teacher(layout)
    if layout.on_policy and layout.stage == 3:
        sent["student gathered to write"] = share * shared(pieces)
    return sent


def gathered_bytes(layout: Layout, pieces: list[Piece]) -> float:
    """Of a micro-batch under ZeRO-3, as benchmarks/scale.py counted it of DeepSpeed 0.19.

    Every block comes for the forward and for the backward; beside adapters a checkpointed block
    comes for its second forward, too, which of a trained one stays (if two blocks have no more than
    stage3_max_reuse_distance numbers). The head stays from its forward to its backward, and so does
    what lies within that distance of the turn; frozen embeddings have no backward.
    """
    lora = layout.model.lora_rank > 0
    text = config_of(layout.student).get_text_config()
    table = text.vocab_size * text.hidden_size
    small = zero_setting(layout, "stage3_param_persistence_threshold", 10)
    sharded = [piece for piece in pieces if not piece.replicated and piece.numel > small]
    tables = [piece.itemsize for piece in sharded if piece.numel == table]
    blocks = [piece for piece in sharded if piece.numel != table]
    reuse = layout.zero["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
    near = max(0.0, reuse / (3 if layout.checkpointing else 2) - table)
    stays = min(1.0, near / max(1, sum(piece.numel for piece in blocks)))
    passes = 3 if lora and layout.checkpointing else 2
    times = 1 + (1 if lora or stays == 1.0 else 2)  # the head's, the embeddings'
    return (passes - stays) * sum(p.bytes for p in blocks) + times * table * max(tables, default=0)


def gathered_of_teacher(layout: Layout) -> float:
    """Of a step: its blocks once for as many micro-batches as its workspace holds, and its head."""
    config = config_of(layout.teacher)
    width, size = config.get_text_config().hidden_size, (config.dtype or torch.float32).itemsize
    states = (2 + layout.hidden_pairs) * layout.tokens * width * size
    at_once = min(layout.accumulation, max(1, layout.teacher_workspace // states))
    passes = -(-layout.accumulation // at_once)
    head = config.get_text_config().vocab_size * width * size
    keeps_head = at_once * states + head <= layout.teacher_workspace
    heads = passes if keeps_head else layout.accumulation
    return passes * (shared(teacher_pieces(layout)) - head) + heads * head


def shared(pieces: list[Piece]) -> float:
    return sum(piece.bytes for piece in pieces if not piece.replicated)


def disk_bytes(layout: Layout, checkpoints: int) -> dict[str, float]:
    """What the hub's cache and the run's folder hold at the end."""
    pieces = student_pieces(layout)
    plain_bytes = sum(
        p.numel() for p in build(config_of(layout.student), torch.bfloat16).parameters()
    )
    trained = sum(piece.numel for piece in pieces if piece.trained)
    saved = sum(piece.bytes for piece in pieces if piece.trained)
    optimizer = (4 + STATES[family(layout.optimizer)]) * trained
    # DeepSpeed saves the module's trained weights beside its shards of the optimizer.
    module = saved if layout.stage else 0.0
    parts = {"student from the hub": 2 * plain_bytes}
    if layout.teacher:
        parts["teacher from the hub"] = sum(piece.bytes for piece in teacher_pieces(layout))
    parts[f"{checkpoints} checkpoints"] = checkpoints * (saved + optimizer + module)
    return parts | {"the trained model": saved}


def describe_disk(parts: dict[str, float]) -> str:
    lines = ["disk"] + [line(name, size) for name, size in parts.items()]
    return "\n".join([*lines, line("sum", sum(parts.values()))])


def measure(device: str, dtype: torch.dtype, link_gb_s: float, efficiency: float) -> Rates:
    """Rates of the present device: one matrix product, one copy; best of five."""
    numbers = 2**28 if device == "cuda" else 2**25
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    copy = best_time(lambda: target.copy_(source), device)
    moved = 2 * source.numel() * source.element_size()
    tflops = matrix_rate(device, dtype) / 1e12
    return Rates(tflops, moved / copy / 1e9, link_gb_s, efficiency)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / best_time(lambda: a @ a, device)


def best_time(run, device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one loads libraries
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
