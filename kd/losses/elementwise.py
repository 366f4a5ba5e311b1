"""All of the loss that is no matrix product: figures of a tile's tokens, and the logits' gradient.

n tokens of a tile, r of a block, V vocabulary. p is the teacher, q the student. The gradients are
written out, because autograd would keep and fill several (n, V) tensors more; the tests hold them
against autograd on `kd.losses.divergences`. Every divergence D of p and q has, with d = dD/dq, the
gradient q (d - sum q d) with respect to the student's logits; terms of d that are the same for all
ids drop out.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vecdot

from kd.losses.objective import METRICS, Head, Objective

# Passes over a block that stays in the processor's cache: over whole tiles they wait for memory.
BLOCK_ELEMENTS = 2**20


def tile_figures(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    student_head: Head,
    teacher_head: Head | None,
    objective: Objective,
    gradient: Tensor | None,
) -> Tensor:
    """(len(METRICS),) sums over a tile, in float64; `gradient` (n, V) is filled where it is given.

    `student` and `teacher` (n, V) are the heads' bare products, and are overwritten; the gradient
    is that of the loss with respect to the student's product, and may lie in `student` itself.
    """
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=student.device)
    rows = max(1, BLOCK_ELEMENTS // student.shape[-1])
    for start in range(0, len(labels), rows):
        block = slice(start, start + rows)
        logits = student_head.finish_(student[block])  # (r, V)
        teacher_logits = None if teacher is None else teacher_head.finish_(teacher[block])  # (r, V)
        figures, logits_gradient = block_figures(
            logits, teacher_logits, labels[block, None], objective, gradient is not None
        )
        sums += torch.stack(figures).sum(-1, dtype=torch.float64)
        if gradient is not None:
            gradient[block] = student_head.unfinish_(logits_gradient, logits)
    return sums


def block_figures(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    objective: Objective,
    with_gradient: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """(METRICS of every token, (r,) each; (r, V) gradient of the loss), from logits and (r, 1) labels."""
    log_q, q = student.log_softmax(-1), student.softmax(-1)
    hard = -log_q.gather(-1, labels)[:, 0]
    student_entropy = -vecdot(q, log_q)
    zero = torch.zeros_like(hard)
    soft = teacher_hard = probability = agreement = teacher_entropy = zero
    gradient = None
    weight = objective.soft_weight
    if teacher is not None:
        log_p, p = teacher.log_softmax(-1), teacher.softmax(-1)
        teacher_hard = -log_p.gather(-1, labels)[:, 0]
        probability = p.gather(-1, labels)[:, 0]
        teacher_entropy = -vecdot(p, log_p)
        agreement = (teacher.argmax(-1) == student.argmax(-1)).to(hard)
        if objective.temperature != 1.0:
            log_p, p = _warm(teacher, objective.temperature)
            log_q, warm_q = _warm(student, objective.temperature)
        else:
            warm_q = q
        closed_form, mixture = CLOSED_FORMS[objective.divergence], objective.mixture.values()
        value, gradient = closed_form(log_p, log_q, p, warm_q, *mixture)
        soft = value[:, 0] * objective.divergence_scale
    if with_gradient:
        gradient = gradient if weight > 0.0 else None
        if gradient is not None:
            gradient.mul_(weight * objective.divergence_scale / objective.temperature)
        if weight < 1.0:
            hard_share = q.mul_(1 - weight)
            gradient = hard_share if gradient is None else gradient.add_(hard_share)
            gradient.scatter_add_(-1, labels, torch.full_like(labels, weight - 1, dtype=q.dtype))
    figures = [hard, soft, teacher_hard, probability, agreement, student_entropy, teacher_entropy]
    return [*figures, torch.ones_like(hard)], gradient


def _warm(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits / temperature
    return scaled.log_softmax(-1), scaled.softmax(-1)


def _forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor):
    return _expectation(p, log_p - log_q), q - p


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor):
    return -_expectation(p, log_q), q - p


def _reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor):
    gap = log_q - log_p  # d without its constant 1
    value = _expectation(q, gap)
    return value, gap.sub_(value).mul_(q)


def _jensen_shannon(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, weight: float):
    log_m = _mixture(q, p, weight).log_()
    gap = log_q - log_m  # d / (1 - weight): the derivatives through m cancel
    to_student = _expectation(q, gap)
    value = weight * _expectation(p, log_p - log_m) + (1 - weight) * to_student
    return value, gap.sub_(to_student).mul_(q).mul_(1 - weight)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: float):
    m = _mixture(q, p, skew)
    value = _expectation(p, log_p - m.log())
    ratio = torch.div(p, m, out=m)  # -d / (1 - skew)
    return value, ratio.sub_(_expectation(q, ratio)).mul_(q).mul_(skew - 1)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: float):
    m = _mixture(p, q, skew)
    gap = log_q - m.log()
    value = _expectation(q, gap)
    d = gap.sub_(torch.div(q, m, out=m), alpha=skew)  # without its constant 1
    return value, d.sub_(_expectation(q, d)).mul_(q)


def _total_variation(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor):
    gap = q - p
    d = gap.sign()
    value = _expectation(gap, d) / 2
    return value, d.sub_(_expectation(q, d)).mul_(q).div_(2)


def _mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """(1 - weight) a + weight b, kept above 0: what lies below counts nothing, its log must not."""
    return torch.lerp(a, b, weight).clamp_min_(torch.finfo(a.dtype).tiny)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over V, (r, 1), with no (r, V) product in memory."""
    return vecdot(p, x)[:, None]


# (log p, log q, p, q, the mixture's weight where there is one), all at the objective's temperature,
# to (value (r, 1), a new (r, V) gradient with respect to the student's logits / temperature).
CLOSED_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "soft_cross_entropy": _soft_cross_entropy,
}
