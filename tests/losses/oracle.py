"""Seeded loss problems, and their loss and metrics from whole logits by plain autograd."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kd.losses.divergences import DIVERGENCES, entropy
from kd.losses.fused import linear_distillation_loss
from kd.losses.head import Head, TeacherOutputs
from kd.losses.metrics import TOKEN_METRICS
from kd.settings.distillation import Objective


@dataclass
class Problem:
    """Seeded inputs: `tokens` targets among `real` ids; both heads have more rows, as padding."""

    tokens: int = 130
    real: int = 53
    student_padding: int = 8
    teacher_padding: int = 16
    width: int = 12
    teacher_width: int = 20
    trained_head: bool = True
    bias: bool = False
    scale: float = 0.5
    softcap: float | None = None
    magnitude: float = 1.0
    seed: int = 0
    hidden: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def head(rows, width, trained):
            weight = normal(rows, width).requires_grad_(trained)
            bias = normal(rows).requires_grad_(trained) if self.bias else None
            return Head(weight, bias, self.scale, self.softcap)

        self.hidden = (self.magnitude * normal(self.tokens, self.width)).requires_grad_()
        self.head = head(self.real + self.student_padding, self.width, self.trained_head)
        self.teacher = TeacherOutputs(
            self.magnitude * normal(self.tokens, self.teacher_width),
            head(self.real + self.teacher_padding, self.teacher_width, False),
        )
        self.labels = torch.randint(0, self.real, (self.tokens,), generator=generator)

    @property
    def trained(self) -> list[Tensor]:
        leaves = (self.hidden, self.head.weight, self.head.bias)
        return [x for x in leaves if x is not None and x.requires_grad]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        """Return the same problem with every tensor rounded to `dtype`."""
        same = replace(self)
        same.labels = self.labels.to(device)
        same.hidden = self.hidden.detach().to(device, dtype).requires_grad_()
        same.head = converted(self.head, dtype, device)
        same.teacher = TeacherOutputs(
            self.teacher.hidden.to(device, dtype), converted(self.teacher.head, dtype, device)
        )
        return same

    def fused(self, objective: Objective, with_teacher: bool = True) -> tuple[Tensor, Tensor]:
        teacher = self.teacher if with_teacher else None
        return linear_distillation_loss(
            self.hidden, self.labels, self.head, objective, self.real, teacher
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return the logits of teacher and student, (N, real) each."""
        return (
            whole_logits(self.teacher.hidden, self.teacher.head)[:, : self.real],
            whole_logits(self.hidden, self.head)[:, : self.real],
        )

    def expected(self, objective: Objective) -> tuple[Tensor, dict[str, float]]:
        teacher, student = self.logits()
        divergence = DIVERGENCES[objective.divergence]
        soft = divergence(teacher, student, objective.temperature, **objective.mixture).sum()
        if objective.temperature_squared:
            soft = soft * objective.temperature**2
        hard = cross_entropy(student, self.labels, reduction="sum")
        loss = objective.soft_weight * soft + (1 - objective.soft_weight) * hard
        label = teacher.softmax(-1).gather(-1, self.labels[:, None])
        return loss, {
            "cross_entropy": hard.item(),
            "divergence": soft.item(),
            "teacher_cross_entropy": cross_entropy(teacher, self.labels, reduction="sum").item(),
            "teacher_label_probability": label.sum().item(),
            "top1_agreement": (teacher.argmax(-1) == student.argmax(-1)).sum().item(),
            "student_entropy": entropy(student).sum().item(),
            "teacher_entropy": entropy(teacher).sum().item(),
            "tokens": float(self.tokens),
        }


def whole_logits(hidden: Tensor, head: Head) -> Tensor:
    """Compute logits (N, V), independently of the code under test."""
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def converted(head: Head, dtype: torch.dtype, device: str) -> Head:
    def tensor(x):
        return None if x is None else x.detach().to(device, dtype).requires_grad_(x.requires_grad)

    return Head(tensor(head.weight), tensor(head.bias), head.scale, head.softcap)


def metrics_by_name(sums: Tensor) -> dict[str, float]:
    return dict(zip(TOKEN_METRICS, sums.tolist(), strict=True))


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative error by norm; the absolute one where `expected` is close to 0."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-3)).item()
