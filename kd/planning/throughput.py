"""Modelled time of a step: counted operations and bytes, divided by the rates of the device.

Nothing overlaps in this model. It is assumed that a step reaches `efficiency` of the matrix rate.
B batch, T tokens, N target tokens, H hidden, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from kd.planning.blueprint import build
from kd.planning.communication import communication_seconds
from kd.planning.device_rates import Rates, matrix_rate
from kd.planning.layout import Layout
from kd.planning.memory import loss_tile, on_policy_row_bytes, on_policy_rows, trained_head
from kd.planning.model_sizes import cached, config_of, student_tensors, teacher_tensors
from kd.planning.model_states import state_bytes

# Bytes moved per byte of a four-bit weight at every use: the weight is read once, and its bfloat16
# copy, four times as large, is written and read.
UNPACKING = 9


@dataclass(frozen=True)
class MatrixWork:
    """The matrix products of a run and the rates of its GPU, in operations and operations/s.

    Attributes:
        per_position: Counted operations per position, with those that checkpointing repeats.
        per_target: Further ones per target token: the heads and the loss.
        measured_rate: Rate of a large product on this GPU, in the precision of the run.
        model_per_token: `model_operations_per_token`.
        vendor_rate: The vendor's rate by the machine file; None without one and in float32.
    """

    per_position: float
    per_target: float
    measured_rate: float
    model_per_token: float
    vendor_rate: float | None = None


@dataclass(frozen=True)
class Duration:
    """The time of a step, part by part."""

    seconds: dict[str, float]
    tokens: int  # per step, over all processes

    @property
    def step(self) -> float:
        """Seconds per step."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        lines = [f"time per step of {self.tokens} tokens (modelled, without overlap)"]
        lines += [f"  {name:<60}{value:8.2f} s" for name, value in self.seconds.items() if value]
        rate = f"total: {self.tokens / self.step:,.0f} tokens/s"
        return "\n".join([*lines, f"  {rate:<60}{self.step:8.2f} s"])


def duration(layout: Layout, rates: Rates) -> Duration:
    """The modelled time of one step."""
    rate = 1e12 * rates.tflops * rates.efficiency
    seconds = {name: count / rate for name, count in operations(layout).items()}
    moved = {
        "reading and unpacking of weights": weight_bytes(layout) + unpacked_bytes(layout),
        "reading of the heads for every tile": head_bytes(layout),
        "optimizer": optimizer_bytes(layout),
    }
    seconds |= {name: size / (1e9 * rates.memory_gb_s) for name, size in moved.items()}
    sending, latency = communication_seconds(layout, rates)
    seconds["communication between processes"] = sending
    seconds["latency of that communication"] = latency
    if layout.on_policy:
        length = layout.on_policy.max_new_tokens
        name = f"the student's generation (each answer {length} tokens long)"
        seconds[name] = generation_bytes(layout) / (1e9 * rates.memory_gb_s)
    return Duration(seconds, layout.processes * layout.tokens * layout.accumulation)


def operations(layout: Layout) -> dict[str, float]:
    """Operations of one process in one step; a multiply-add counts as two."""
    tokens = layout.tokens * layout.accumulation
    forward = forward_operations(layout.student, layout, tokens)
    trained = sum(tensor.numel for tensor in student_tensors(layout) if tensor.trained)
    lora = layout.model.lora_rank > 0
    # Frozen weights need only the gradient of their inputs.
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


def matrix_work(
    layout: Layout, device: torch.device, tflops: float | None = None
) -> MatrixWork | None:
    """The work of a run whose machine file states `tflops`, a rate for half precision.

    None on a CPU, where the other processes decide the rate.
    """
    if device.type != "cuda":
        return None
    rate = matrix_rate("cuda", getattr(torch, layout.half or "float32"))
    vendor = 1e12 * tflops if tflops and layout.half else None
    model = model_operations_per_token(layout)
    return MatrixWork(*operations_per_token(layout), rate, model, vendor)


def model_operations_per_token(layout: Layout) -> float:
    """Operations that the models need for a token, however they are trained: 6 N + 2 N_teacher.

    N are the weights of a model's matrix products: its Linears and its head. A forward takes 2 N, a
    backward 4 N. Nothing is repeated, and attention's products are left out (Chowdhery et al. 2022,
    PaLM, appendix B, without their small last term).
    """
    student, teacher = layout.student, layout.teacher
    return 6 * numbers_of_products(student) + (2 * numbers_of_products(teacher) if teacher else 0)


def numbers_of_products(name: str) -> int:
    """The number of weights in a model's Linears and in its head."""
    numbers = cached(("linears", name), lambda: numbers_of_linears(name))
    text = config_of(name).get_text_config()
    return numbers + text.vocab_size * text.hidden_size


def operations_per_token(layout: Layout) -> tuple[float, float]:
    """(operations per position, additional operations per target token)."""
    counts = operations(layout)
    tokens = layout.tokens * layout.accumulation
    heads = counts.pop("heads and loss")
    return sum(counts.values()) / tokens, heads / tokens


def forward_operations(name: str, layout: Layout, tokens: int) -> float:
    """A forward over `tokens` tokens: the backbone's Linears, and causal attention's products."""
    numbers = cached(("linears", name), lambda: numbers_of_linears(name))
    text = config_of(name).get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * layout.max_length * text.num_attention_heads * width * text.num_hidden_layers
    return tokens * (2 * numbers + attention)


def numbers_of_linears(name: str) -> int:
    """The number of weights in the backbone's Linears."""
    model = build(config_of(name), torch.float32)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return sum(linear.weight.numel() for linear in linears)


def weight_bytes(layout: Layout) -> float:
    """Bytes of weights in 16 or 32 bits that are read in a step: in every pass of a micro-batch."""
    passes = layout.accumulation * (3 if layout.checkpointing else 2)
    tensors = student_tensors(layout)
    packed = layout.model.quantization == "nf4"
    read = passes * sum(tensor.bytes for tensor in tensors if tensor.trained or not packed)
    if layout.teacher and not getattr(config_of(layout.teacher), "quantization_config", None):
        read += layout.accumulation * sum(tensor.bytes for tensor in teacher_tensors(layout))
    return read


def head_bytes(layout: Layout) -> float:
    """Bytes that the loss moves in a step because each tile uses the whole heads.

    A tile reads a head once for every product. With a trained head it adds to a float32 gradient.
    """
    text = config_of(layout.student).get_text_config()
    itemsize = getattr(torch, layout.half or layout.model.dtype).itemsize
    moved = text.vocab_size * text.hidden_size * (2 * itemsize + (8 if trained_head(layout) else 0))
    if layout.teacher:
        config = config_of(layout.teacher)
        teacher, size = config.get_text_config(), (config.dtype or torch.float32).itemsize
        moved += teacher.vocab_size * teacher.hidden_size * size
    return layout.accumulation * math.ceil(layout.tokens / loss_tile(layout)) * moved


def unpacked_bytes(layout: Layout) -> float:
    """Bytes moved in a step to unpack four-bit weights to bfloat16 at every use."""
    passes = layout.accumulation * (3 if layout.checkpointing else 2)
    moved = 0.0
    if layout.model.quantization == "nf4":
        moved += passes * UNPACKING * sum(t.bytes for t in student_tensors(layout) if not t.trained)
    if layout.teacher and getattr(config_of(layout.teacher), "quantization_config", None):
        moved += layout.accumulation * UNPACKING * sum(t.bytes for t in teacher_tensors(layout))
    return moved


def generation_bytes(layout: Layout) -> float:
    """Bytes read to generate a step's answers: all weights for every token of every batch."""
    workspace = 2**20 * layout.on_policy.generation_workspace_mb
    rows = max(1, workspace // on_policy_row_bytes(layout))
    batches = math.ceil(on_policy_rows(layout) / rows)
    packed = layout.model.quantization == "nf4"
    weights = sum(
        tensor.bytes * (UNPACKING if packed and not tensor.trained else 1)
        for tensor in student_tensors(layout)
    )
    return batches * min(layout.on_policy.max_new_tokens, layout.max_length) * weights


def optimizer_bytes(layout: Layout) -> float:
    """Bytes that one process's optimizer moves in a step."""
    trained = sum(tensor.numel for tensor in student_tensors(layout) if tensor.trained)
    shards = layout.processes if layout.stage else 1
    return (2 * state_bytes(layout.optimizer) + 16) * trained / shards
