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
BLOCK_ELEMENTS = 5 * 2**17  # 4 rows of 152 064
# Blocks of scratch, written again and again: fresh ones cost a page fault every 4 KiB, which took
# as long as the arithmetic.
SCRATCH = 5
STRETCH = 512  # ids whose highest is found at once


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

    def figures_of(block: slice, logits: Tensor, labels: Tensor, scratch: Tensor):
        teacher_logits = None if teacher is None else teacher_head.finish_(teacher[block])  # (r, V)
        with_gradient = gradient is not None
        return block_figures(logits, teacher_logits, labels, objective, with_gradient, scratch)

    return in_blocks(
        figures_of, block_rows(student), SCRATCH, student, labels, student_head, gradient
    )


def block_rows(logits: Tensor) -> int:
    """Rows of a block of logits (n, V), for a processor's cache."""
    return min(len(logits), max(1, BLOCK_ELEMENTS // logits.shape[1]))


def in_blocks(
    figures_of: Callable[[slice, Tensor, Tensor, Tensor], tuple[list[Tensor], Tensor | None]],
    rows: int,
    scratch_blocks: int,
    student: Tensor,
    labels: Tensor,
    student_head: Head,
    gradient: Tensor | None,
) -> Tensor:
    """As tile_figures, `rows` at a time: `figures_of` gives what block_figures gives.

    It is called with the block, its logits (r, V), its labels (r, 1) and scratch_blocks of (r, V).
    """
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=student.device)
    n, vocabulary = student.shape
    scratch = student.new_empty(scratch_blocks, rows, vocabulary)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        logits = student_head.finish_(student[block])  # (r, V)
        part = scratch[:, : block.stop - block.start]
        figures, logits_gradient = figures_of(block, logits, labels[block, None], part)
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
    scratch: Tensor,
) -> tuple[list[Tensor], Tensor | None]:
    """(METRICS of every token, (r,) each; (r, V) gradient of the loss), from logits (r, V).

    `labels` are (r, 1); `scratch` is (SCRATCH, r, V), and the gradient lies in it.
    """
    log_p, p, log_q, q, spare = scratch
    weight, temperature = objective.soft_weight, objective.temperature
    likeliest = probabilities(student, log_q, q)  # (r, 1)
    hard = -log_q.gather(-1, labels)[:, 0]
    student_entropy = -vecdot(q, log_q)
    zero = torch.zeros_like(hard)
    soft = teacher_hard = probability = agreement = teacher_entropy = zero
    gradient = None
    if teacher is not None:
        theirs = probabilities(teacher, log_p, p)  # (r, 1)
        teacher_hard = -log_p.gather(-1, labels)[:, 0]
        probability = p.gather(-1, labels)[:, 0]
        teacher_entropy = -vecdot(p, log_p)
        agreement = (theirs == likeliest)[:, 0].to(hard)
        if temperature != 1.0:
            probabilities(torch.div(teacher, temperature, out=spare), log_p, p)
            probabilities(torch.div(student, temperature, out=spare), log_q, q)
        closed_form, mixture = CLOSED_FORMS[objective.divergence], objective.mixture.values()
        value, gradient = closed_form(log_p, log_q, p, q, spare, *mixture)
        soft = value[:, 0] * objective.divergence_scale
    if with_gradient:
        if weight < 1.0 and teacher is not None and temperature != 1.0:
            torch.softmax(student, -1, out=q)
        gradient = weighted(gradient, q, labels, objective)
    figures = [hard, soft, teacher_hard, probability, agreement, student_entropy, teacher_entropy]
    return [*figures, torch.ones_like(hard)], gradient


def probabilities(logits: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    """Fills log_p and p (r, V) from logits (r, V); gives the likeliest ids, (r, 1).

    One pass of softmax: its normaliser is read back from the likeliest id's probability, at least
    1 / V, which costs half of what softmax and log_softmax cost together.
    """
    torch.softmax(logits, -1, out=p)
    top = argmax(logits)
    torch.sub(logits, logits.gather(-1, top) - p.gather(-1, top).log(), out=log_p)
    return top


def argmax(logits: Tensor) -> Tensor:
    """(r, 1) ids of the highest of logits (r, V), the first where several are.

    Only the maximum is fast in PyTorch on a CPU, its place is not: the place is looked for in the
    first stretch that has the maximum.
    """
    width = logits.shape[-1]
    if logits.is_cuda or width < 2 * STRETCH:
        return logits.argmax(-1, keepdim=True)
    whole = width // STRETCH * STRETCH
    stretches = logits[:, :whole].unflatten(-1, (-1, STRETCH))
    best = stretches.amax(-1).argmax(-1, keepdim=True)  # (r, 1)
    inside = stretches.take_along_dim(best[..., None], 1)[:, 0].argmax(-1, keepdim=True)
    top = best * STRETCH + inside
    if whole == width:
        return top
    value, place = logits[:, whole:].max(-1, keepdim=True)
    return torch.where(value > logits.gather(-1, top), whole + place, top)


def weighted(soft: Tensor | None, q: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """The loss's gradient (r, V) of the divergence's and, by q, the cross-entropy's; in place."""
    weight = objective.soft_weight
    if weight == 0.0:
        gradient = q
    else:
        factor = weight * objective.divergence_scale / objective.temperature
        gradient = soft if factor == 1.0 else soft.mul_(factor)
        if weight == 1.0:
            return gradient
        gradient.add_(q, alpha=1 - weight)
    return gradient.scatter_add_(-1, labels, torch.full_like(labels, weight - 1, dtype=q.dtype))


# The closed forms: from log p, log q, p and q, (r, V) each, all at the objective's temperature, to
# the value (r, 1) and the gradient (r, V) with respect to the student's logits / temperature. They
# may overwrite all of these but q, and `spare`.


def _forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    value = _expectation(p, torch.sub(log_p, log_q, out=spare))
    return value, torch.sub(q, p, out=spare)


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    return -_expectation(p, log_q), torch.sub(q, p, out=spare)


def _reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    gap = torch.sub(log_q, log_p, out=spare)  # d without its constant 1
    value = _expectation(q, gap)
    return value, gap.sub_(value).mul_(q)


def _jensen_shannon(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor, weight: float
):
    log_m = _mixture(q, p, weight, spare).log_()
    to_teacher = _expectation(p, log_p.sub_(log_m))
    gap = log_q.sub_(log_m)  # d / (1 - weight): the derivatives through m cancel
    to_student = _expectation(q, gap)
    value = weight * to_teacher + (1 - weight) * to_student
    return value, gap.sub_(to_student).mul_(q).mul_(1 - weight)


def _skew_forward_kl(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor, skew: float
):
    m = _mixture(q, p, skew, spare)
    value = _expectation(p, log_p.sub_(torch.log(m, out=log_q)))
    ratio = torch.div(p, m, out=m)  # -d / (1 - skew)
    return value, ratio.sub_(_expectation(q, ratio)).mul_(q).mul_(skew - 1)


def _skew_reverse_kl(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor, skew: float
):
    m = _mixture(p, q, skew, spare)
    gap = log_q.sub_(torch.log(m, out=log_p))
    value = _expectation(q, gap)
    d = gap.sub_(torch.div(q, m, out=m), alpha=skew)  # without its constant 1
    return value, d.sub_(_expectation(q, d)).mul_(q)


def _total_variation(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    gap = torch.sub(q, p, out=spare)
    d = torch.sign(gap, out=log_q)  # 2 d
    value = _expectation(gap, d) / 2
    return value, d.sub_(_expectation(q, d)).mul_(q).div_(2)


def _mixture(a: Tensor, b: Tensor, weight: float, out: Tensor) -> Tensor:
    """(1 - weight) a + weight b, kept above 0: what lies below counts nothing, its log must not."""
    return torch.lerp(a, b, weight, out=out).clamp_min_(torch.finfo(a.dtype).tiny)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over V, (r, 1), with no (r, V) product in memory."""
    return vecdot(p, x)[:, None]


CLOSED_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "soft_cross_entropy": _soft_cross_entropy,
}


def divergence_of_classes(
    log_p: Tensor, log_q: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(value (r, 1), gradient (r, K)) between classes that need no scratch; both are overwritten."""
    closed_form = CLOSED_FORMS[objective.divergence]
    spare = torch.empty_like(log_p)
    return closed_form(log_p, log_q, log_p.exp(), log_q.exp(), spare, *objective.mixture.values())
