"""What is minimised and measured, and the two heads that turn hidden states into logits.

N target tokens, V vocabulary, H hidden.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

METRICS = (
    "cross_entropy",
    "divergence",
    "teacher_cross_entropy",
    "teacher_label_probability",
    "top1_agreement",
    "student_entropy",
    "teacher_entropy",
    "tokens",
)  # sums over target tokens, probabilities at temperature 1; `tokens` is their number


@dataclass(frozen=True)
class Objective:
    """soft_weight * divergence(temperature) + (1 - soft_weight) * cross-entropy, a target token.

    With `temperature_squared` the divergence is multiplied by temperature^2, its gradient with it.
    """

    soft_weight: float = 0.0
    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_squared: bool = False
    jensen_shannon_weight: float = 0.5
    skew: float = 0.1
    loss_workspace_mb: int = 512

    @property
    def divergence_scale(self) -> float:
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def mixture(self) -> dict[str, float]:
        """The keyword with which `kd.losses.divergences` takes the mixture, where there is one."""
        if self.divergence == "jensen_shannon":
            return {"weight": self.jensen_shannon_weight}
        return {"skew": self.skew} if self.divergence.startswith("skew_") else {}

    def total(self, divergence: Tensor, cross_entropy: Tensor) -> Tensor:
        """The loss of its two terms, `divergence` with its scale in it.

        Not a plain sum: a weight of 0 must not let an infinite other term make the loss NaN.
        """
        weight = self.soft_weight
        if weight == 0.0:
            return cross_entropy
        return divergence if weight == 1.0 else weight * divergence + (1 - weight) * cross_entropy


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap(scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """(n, H) to (n, vocabulary), in the weight's type; padded ids get no probability."""
        return self.finish_(hidden.to(self.weight.dtype) @ self.weight[:vocabulary].T)

    def finish_(self, product: Tensor) -> Tensor:
        """(n, V) hidden @ weight.T to logits, in place: what a head does beside its product."""
        if self.bias is not None:
            product.add_(self.bias[: product.shape[-1]])
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def unfinish_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """(n, V) gradient of `logits` to that of the product, in place, both: finish_ backwards."""
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient

    def to(self, dtype: torch.dtype) -> "Head":
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)


@dataclass
class TeacherSignal:
    """What a teacher gives a batch: its hidden states at the target positions, and its head."""

    hidden: Tensor  # (N, H of the teacher)
    head: Head = field(repr=False)
