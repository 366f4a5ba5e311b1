"""The loss of a tile where the teacher is known by its k likeliest ids and the mass of all others.

n tokens of a tile, r of a block, V vocabulary, k ids; a class is one of the k ids, or the tail: all
other ids as one. A divergence is taken between the two distributions over these k + 1 classes. That
is a true divergence, 0 where the student's classes are the teacher's, and for all but
soft_cross_entropy at most that of the whole vocabulary (data processing inequality). Within the
tail the student is free: of d loss / d logit of a tail id, (share of the tail) * (that of the class).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot

from kd.losses import elementwise
from kd.losses.objective import Head, Objective

SCRATCH = 3  # blocks (r, V)


@dataclass
class SparseSignal:
    """What a cache knows of a teacher at N target tokens, at the objective's temperature.

    The last two are at temperature 1, for the metrics. `log_tail` is None where k is the whole
    vocabulary. The classes need not sum to 1 exactly: they are normalised here.
    """

    ids: Tensor  # (N, k), likeliest first
    log_probabilities: Tensor  # (N, k)
    log_tail: Tensor | None  # (N,)
    label_log_probability: Tensor  # (N,)
    entropy: Tensor  # (N,)

    def to(self, device: torch.device) -> "SparseSignal":
        tensors = vars(self).items()
        return SparseSignal(**{k: None if v is None else v.to(device) for k, v in tensors})

    def rows(self, tile: slice, exact: torch.dtype) -> "SparseSignal":
        """The tokens of a tile, in the type of the loss."""
        log_p = self.log_probabilities[tile].to(exact)
        tail = None if self.log_tail is None else self.log_tail[tile].to(exact)
        classes = log_p if tail is None else torch.cat([log_p, tail[:, None]], -1)
        total = classes.logsumexp(-1, keepdim=True)  # what the cache's rounding left over
        return SparseSignal(
            self.ids[tile].long(),
            log_p - total,
            None if tail is None else tail - total[:, 0],
            self.label_log_probability[tile].to(exact),
            self.entropy[tile].to(exact),
        )

    @property
    def classes(self) -> Tensor:
        """(N, k + 1) log-probabilities, or (N, k) where there is no tail."""
        if self.log_tail is None:
            return self.log_probabilities
        return torch.cat([self.log_probabilities, self.log_tail[:, None]], -1)


def tile_figures(
    student: Tensor,
    teacher: SparseSignal,
    labels: Tensor,
    student_head: Head,
    objective: Objective,
    gradient: Tensor | None,
) -> Tensor:
    """As elementwise.tile_figures, of the student's product (n, V) and the teacher's `rows`."""

    def figures_of(block: slice, logits: Tensor, labels: Tensor, scratch: Tensor):
        known, with_gradient = teacher.rows(block, student.dtype), gradient is not None
        return block_figures(logits, known, labels, objective, with_gradient, scratch)

    rows = len(student) if student.is_cuda else elementwise.block_rows(student)
    return elementwise.in_blocks(figures_of, rows, SCRATCH, student, labels, student_head, gradient)


def block_figures(
    student: Tensor,
    teacher: SparseSignal,
    labels: Tensor,
    objective: Objective,
    with_gradient: bool,
    scratch: Tensor,
) -> tuple[list[Tensor], Tensor | None]:
    """(METRICS of every token, (r,) each; (r, V) gradient of the loss), from logits (r, V)."""
    log_q, q, rest = scratch
    ids, temperature = teacher.ids, objective.temperature
    likeliest = elementwise.probabilities(student, log_q, q)  # (r, 1)
    hard = -log_q.gather(-1, labels)[:, 0]
    student_entropy = -vecdot(q, log_q)
    agreement = (likeliest == ids[:, :1])[:, 0].to(hard)

    torch.div(student, temperature, out=rest)
    total = rest.logsumexp(-1, keepdim=True)  # (r, 1)
    log_classes = rest.gather(-1, ids) - total  # (r, k)
    if teacher.log_tail is not None:
        # The tail's mass from its own logits: 1 - the others would cancel.
        tail = rest.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        log_classes = torch.cat([log_classes, tail - total], -1)  # (r, k + 1)
    value, class_gradient = elementwise.divergence_of_classes(
        teacher.classes, log_classes, objective
    )
    soft = value[:, 0] * objective.divergence_scale
    gradient = None
    if with_gradient:
        if teacher.log_tail is not None:
            # Each tail id's share of the tail; 0 at the k ids.
            rest.sub_(tail).exp_().mul_(class_gradient[:, -1:])
            class_gradient = class_gradient[:, :-1]
        rest.scatter_(-1, ids, class_gradient)
        gradient = elementwise.weighted(rest, q, labels, objective)
    teacher_hard = -teacher.label_log_probability
    figures = [hard, soft, teacher_hard, (-teacher_hard).exp(), agreement, student_entropy]
    return [*figures, teacher.entropy, torch.ones_like(hard)], gradient
