"""The training loss from hidden states and heads, in tiles of tokens: (N, V) never exists whole.

N target tokens, V vocabulary, H hidden. Both terms and all metrics come from one pass over a tile's
logits, and the gradient of the SUM over tokens is formed in that pass, in float32, because the loss
scale is known only in backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.losses.divergences import DIVERGENCES, entropy

TILE = 128  # tokens whose logits exist at one time

METRICS = (
    "cross_entropy",
    "divergence",
    "teacher_cross_entropy",
    "agreement",
    "student_entropy",
    "teacher_entropy",
    "tokens",
)  # sums over target tokens; `tokens` is their number


@dataclass(frozen=True)
class Objective:
    """soft_weight * divergence(temperature) + (1 - soft_weight) * cross-entropy, a target token.

    With `temperature_squared` the divergence is multiplied by temperature^2, its gradient with it.
    """

    soft_weight: float = 0.0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_squared: bool = False

    @property
    def divergence_scale(self) -> float:
        return self.temperature**2 if self.temperature_squared else 1.0


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """(n, H) to (n, vocabulary), in the weight's type; padded ids get no probability."""
        logits = hidden.to(self.weight.dtype) @ self.weight[:vocabulary].T
        if self.bias is not None:
            logits = logits + self.bias[:vocabulary]
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def to(self, dtype: torch.dtype) -> "Head":
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)


@dataclass
class TeacherSignal:
    """What a teacher gives a batch: its hidden states at the target positions, and its head."""

    hidden: Tensor  # (N, H of the teacher)
    head: Head = field(repr=False)


def linear_distillation_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    objective: Objective,
    vocabulary: int,
    teacher: TeacherSignal | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss summed over tokens, metric sums in the order of METRICS).

    `hidden` (N, H) predicts `labels` (N,). N may be 0: the loss is then 0 with a gradient path.
    The gradient reaches `hidden` and, where they train, the head's weight and bias.
    """
    assert teacher is not None or objective.soft_weight == 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        return _FusedLoss.apply(
            hidden,
            head.weight,
            head.bias,
            labels,
            head,
            objective,
            vocabulary,
            teacher,
            torch.is_grad_enabled(),
        )


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, head, objective, vocabulary, teacher, grad_mode):
        inputs = (hidden, weight, bias)
        trained = [grad_mode and needed for needed in ctx.needs_input_grad[:3]]
        # The whole pass is in float32, or in float64 where the inputs are.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        leaves = [
            None if x is None else x.detach().to(exact).requires_grad_(t)
            for x, t in zip(inputs, trained, strict=True)
        ]
        gradients = [
            torch.zeros_like(leaf) if t else None for leaf, t in zip(leaves, trained, strict=True)
        ]
        student_head = Head(leaves[1], leaves[2], head.scale, head.softcap)
        if teacher is not None:
            teacher = TeacherSignal(teacher.hidden, teacher.head.to(exact))
        total = torch.zeros((), dtype=exact, device=hidden.device)
        sums = torch.zeros(len(METRICS), dtype=exact, device=hidden.device)
        for start in range(0, len(labels), TILE):
            tile = slice(start, start + TILE)
            tile_hidden = leaves[0].detach()[tile].requires_grad_(trained[0])
            tile_teacher = teacher and TeacherSignal(teacher.hidden[tile], teacher.head)
            with torch.set_grad_enabled(any(trained)):
                loss, tile_sums = _tile_loss(
                    tile_hidden, labels[tile], student_head, objective, vocabulary, tile_teacher
                )
            if any(trained):
                wanted = [tile_hidden, leaves[1], leaves[2]]
                wanted = [x for x, t in zip(wanted, trained, strict=True) if t]
                found = iter(torch.autograd.grad(loss, wanted))
                if trained[0]:
                    gradients[0][tile] = next(found)
                for gradient in gradients[1:]:
                    if gradient is not None:
                        gradient += next(found)
            total += loss.detach()
            sums += tile_sums
        ctx.gradients = gradients
        ctx.types = [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx, grad_output, _):
        scaled = [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.types, strict=True)
        ]
        return (*scaled, *[None] * 6)


def _tile_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    objective: Objective,
    vocabulary: int,
    teacher: TeacherSignal | None,
) -> tuple[Tensor, Tensor]:
    student_logits = head.logits(hidden, vocabulary)  # (n, V)
    hard = cross_entropy(student_logits, labels, reduction="sum")
    zero = torch.zeros_like(hard)
    soft = teacher_hard = agreement = teacher_entropy = zero
    if teacher is not None:
        with torch.no_grad():
            teacher_logits = teacher.head.logits(teacher.hidden, vocabulary)  # (n, V)
            teacher_hard = cross_entropy(teacher_logits, labels, reduction="sum")
            teacher_entropy = entropy(teacher_logits).sum()
            agreement = (teacher_logits.argmax(-1) == student_logits.argmax(-1)).sum().to(hard)
        divergence: Callable[..., Tensor] = DIVERGENCES[objective.divergence]
        soft = divergence(teacher_logits, student_logits, objective.temperature).sum()
        soft = soft * objective.divergence_scale
    weight = objective.soft_weight
    # Not a plain sum: a weight of 0 must not let an infinite other term make the loss NaN.
    loss = hard if weight == 0.0 else soft if weight == 1.0 else weight * soft + (1 - weight) * hard
    with torch.no_grad():
        student_entropy = entropy(student_logits).sum()
    count = zero + len(labels)
    values = (hard, soft, teacher_hard, agreement, student_entropy, teacher_entropy, count)
    return loss, torch.stack([value.detach() for value in values])
