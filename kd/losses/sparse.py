"""The loss against a teacher known only by its k most likely ids and the mass of all other ids.

n tokens of a tile, r of a block, N target tokens, V vocabulary. A class is one of the k ids, or the
tail: all other ids together. The divergence is taken between teacher and student as distributions
over these k + 1 classes. It is 0 exactly where the student's classes equal the teacher's and,
except for soft_cross_entropy, at most the divergence over the whole vocabulary (data processing
inequality). Within the tail the student is free: the gradient of a tail id's logit is that of the
tail's class times the id's share of the tail.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.losses import elementwise
from kd.losses.head import Head
from kd.settings.distillation import Objective

SCRATCH = 3  # (r, V) scratch tensors


@dataclass
class SparseTeacherOutputs:
    """What a teacher cache holds for N target tokens.

    The cached values are rounded, so classes need not sum to 1; `rows` normalizes them.

    Attributes:
        ids: (N, k) most likely ids, in descending order of probability.
        log_probabilities: (N, k) of these ids, at the objective's temperature.
        log_tail: (N,) log of the mass of all other ids, at the objective's temperature; None where
            k is the whole vocabulary.
        label_log_probability: (N,) of the label at temperature 1, for the metrics.
        entropy: (N,) of the whole distribution at temperature 1, in nats, for the metrics.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_tail: Tensor | None
    label_log_probability: Tensor
    entropy: Tensor

    def to(self, device: torch.device) -> "SparseTeacherOutputs":
        """Return these outputs on `device`."""
        tensors = vars(self).items()
        return SparseTeacherOutputs(**{k: None if v is None else v.to(device) for k, v in tensors})

    def rows(self, tile: slice, exact: torch.dtype) -> "SparseTeacherOutputs":
        """Return the tokens of a tile in the dtype of the loss, with normalized classes."""
        log_p = self.log_probabilities[tile].to(exact)
        tail = None if self.log_tail is None else self.log_tail[tile].to(exact)
        classes = log_p if tail is None else torch.cat([log_p, tail[:, None]], -1)
        total = classes.logsumexp(-1, keepdim=True)
        return SparseTeacherOutputs(
            self.ids[tile].long(),
            log_p - total,
            None if tail is None else tail - total[:, 0],
            self.label_log_probability[tile].to(exact),
            self.entropy[tile].to(exact),
        )

    @property
    def classes(self) -> Tensor:
        """Log-probabilities of the classes: (N, k + 1), or (N, k) without a tail."""
        if self.log_tail is None:
            return self.log_probabilities
        return torch.cat([self.log_probabilities, self.log_tail[:, None]], -1)


def tile_metrics(
    student: Tensor,
    teacher: SparseTeacherOutputs,
    labels: Tensor,
    student_head: Head,
    objective: Objective,
    gradient: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute the metric sums of a tile and fill `gradient`, as `elementwise.tile_metrics` does.

    `student` is the product (n, V) of the student's head, `teacher` the normalized `rows` of the
    tile, `labels` (n,), `gradient` (n, V) and `scales` (n,) or None. Returns (len(TOKEN_METRICS),)
    in float64.
    """

    def metrics_of(block: slice, logits: Tensor, labels: Tensor, scratch: Tensor):
        known, with_gradient = teacher.rows(block, student.dtype), gradient is not None
        return block_metrics(logits, known, labels, objective, with_gradient, scratch)

    rows = len(student) if student.is_cuda else elementwise.block_rows(student)
    return elementwise.in_blocks(
        metrics_of, rows, SCRATCH, student, labels, student_head, gradient, scales
    )


def block_metrics(
    student: Tensor,
    teacher: SparseTeacherOutputs,
    labels: Tensor,
    objective: Objective,
    with_gradient: bool,
    scratch: Tensor,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute a block's metrics and the gradient of its loss, as `elementwise.block_metrics` does.

    Takes logits (r, V), labels (r, 1) and scratch (SCRATCH, r, V). Returns the metrics, (r,) each,
    and the gradient, (r, V).
    """
    log_q, q, rest = scratch
    ids, temperature = teacher.ids, objective.temperature
    student_argmax = elementwise.probabilities(student, log_q, q)  # (r, 1)
    cross_entropy = -log_q.gather(-1, labels)[:, 0]
    student_entropy = elementwise.entropy(q, log_q, rest)
    agreement = (student_argmax == ids[:, :1])[:, 0].to(cross_entropy)

    elementwise.scaled_logits(student, temperature, out=rest)
    total = rest.logsumexp(-1, keepdim=True)  # (r, 1)
    log_classes = rest.gather(-1, ids) - total  # (r, k)
    if teacher.log_tail is not None:
        # From the tail's own logits: 1 minus the mass of the k ids would lose all digits.
        tail = rest.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_classes = torch.cat([log_classes, tail - total], -1)  # (r, k + 1)
    value, class_gradient = elementwise.class_divergence(teacher.classes, log_classes, objective)
    gradient = None
    if with_gradient:
        if teacher.log_tail is not None:
            # Each tail id's share of the tail; 0 at the k ids, where rest is -inf.
            rest.sub_(tail.clamp(min=torch.finfo(tail.dtype).min)).exp_().mul_(
                class_gradient[:, -1:]
            )
            class_gradient = class_gradient[:, :-1]
        rest.scatter_(-1, ids, class_gradient)
        gradient = elementwise.loss_gradient(rest, q, labels, objective)
    metrics = {
        "cross_entropy": cross_entropy,
        "divergence": value[:, 0] * objective.divergence_scale,
        "teacher_cross_entropy": -teacher.label_log_probability,
        "teacher_label_probability": teacher.label_log_probability.exp(),
        "top1_agreement": agreement,
        "student_entropy": student_entropy,
        "teacher_entropy": teacher.entropy,
    }
    return metrics, gradient
