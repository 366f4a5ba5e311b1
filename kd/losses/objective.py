"""What is minimised and measured, and the two heads that turn hidden states into logits.

N target tokens, V vocabulary, H hidden.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kd.recipe import setting

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


Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
]


@dataclass(frozen=True)
class Objective:
    """The training loss, per target token, as a recipe sets it and as the loss reads it.

    loss = soft_weight * divergence(temperature) + (1 - soft_weight) * cross-entropy, plus
    hidden_weight * hidden-state loss. Supervised fine-tuning is `Objective(soft_weight=0.0)`.
    Raises ValueError if a weight or a temperature is out of range.
    """

    soft_weight: float = setting(
        1.0, "Weight of the divergence; cross-entropy has the rest. 1: divergence only, 0: SFT."
    )
    divergence: Divergence = setting(
        "forward_kl", "Divergence between the teacher's and the student's next-token distributions."
    )
    temperature: float = setting(
        1.0, "Softmax temperature of teacher and student in the divergence."
    )
    temperature_squared: bool = setting(
        False, "Multiply the divergence and its gradient by temperature^2 (Hinton et al. 2015)."
    )
    jensen_shannon_weight: float = setting(
        0.5, "Weight of the teacher in the mixture of jensen_shannon; 0.5 is symmetric."
    )
    skew: float = setting(
        0.1, "Mixture weight of the first distribution in skew_forward_kl and skew_reverse_kl."
    )
    loss_workspace_mb: int = setting(
        512, "Memory for logits in the loss, in MiB per device; tokens are processed in tiles."
    )
    hidden_weight: float = setting(
        0.0, "Weight of the loss between hidden states; 0 disables it.", repr=False
    )
    hidden_loss: Literal["cosine", "mse"] = setting(
        "cosine", "Loss between hidden states of student and teacher.", repr=False
    )
    hidden_layers: list[str] | None = setting(
        None,
        "Layers of the hidden-state loss as student:teacher pairs; 0 is the embedding output. "
        "Default: the origin of each inherited block, otherwise evenly spaced teacher blocks.",
        repr=False,
        hash=False,
    )

    def __post_init__(self) -> None:
        if self.hidden_weight < 0.0:
            raise ValueError(f"hidden_weight: {self.hidden_weight}; wanted 0 or more")
        if not 0.0 <= self.soft_weight <= 1.0:
            raise ValueError(f"soft_weight: {self.soft_weight}; wanted 0 to 1")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature: {self.temperature}; wanted more than 0")
        for key in ("jensen_shannon_weight", "skew"):
            if not 0.0 < getattr(self, key) < 1.0:
                raise ValueError(
                    f"{key}: {getattr(self, key)}; wanted more than 0 and less than 1 "
                    "(for the limits, set divergence: forward_kl or reverse_kl)"
                )
        if self.loss_workspace_mb < 128:
            raise ValueError(f"loss_workspace_mb: {self.loss_workspace_mb}; wanted 128 or more")

    @property
    def divergence_scale(self) -> float:
        """The factor of the divergence: temperature^2 with `temperature_squared`, otherwise 1."""
        return self.temperature**2 if self.temperature_squared else 1.0

    @property
    def mixture(self) -> dict[str, float]:
        """The mixture argument of the divergence in `kd.losses.divergences`; empty if it has none."""
        if self.divergence == "jensen_shannon":
            return {"weight": self.jensen_shannon_weight}
        return {"skew": self.skew} if self.divergence.startswith("skew_") else {}

    def total(self, divergence: Tensor, cross_entropy: Tensor) -> Tensor:
        """Combine the two terms, each of any one shape; `divergence` includes its scale.

        A term of weight 0 is left out: multiplied by 0, an infinite one would make the loss NaN.
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
