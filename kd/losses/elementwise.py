"""Everything in the loss except the matrix products: per-token metrics and the logits' gradient.

n tokens of a tile, r of a block, V vocabulary; p is the teacher, q the student. The fused loss
hands over a tile of head products; this file works through it in blocks of a few rows, which stay
in the processor's cache. Gradients are written out by hand (kd.losses.divergences).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vecdot

from kd.losses.divergences import CLOSED_FORMS
from kd.losses.head import Head
from kd.losses.metrics import TOKEN_METRICS
from kd.settings.distillation import Objective

BLOCK_ELEMENTS = 5 * 2**17  # 4 rows of 152 064: larger blocks leave the cache and wait for memory
# (r, V) scratch tensors, reused by all blocks: new ones cost a page fault per 4 KiB, which took as
# long as the arithmetic.
SCRATCH = 6
STRETCH = 512  # ids per stretch of `argmax`
# Rows of a float16 gradient are multiplied by powers of two, so that their largest element is below
# 2 ** (LARGEST_BITS + 1) and small ones do not underflow; by at most 2 ** SCALE_BITS.
LARGEST_BITS, SCALE_BITS = 14, 18


def tile_metrics(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    student_head: Head,
    teacher_head: Head | None,
    objective: Objective,
    gradient: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute the metric sums of a tile and, where `gradient` is given, fill it.

    Args:
        student: (n, V) product of the student's head, without bias, scale and softcap; overwritten.
        teacher: (n, V) product of the teacher's head, overwritten too; None without a teacher.
        labels: (n,) target ids.
        student_head: Finishes the student's product.
        teacher_head: Finishes the teacher's product.
        objective: The loss.
        gradient: (n, V), receives the gradient of the loss summed over the tile with respect to
            the student's product. It may share memory with `student`.
        scales: (n,), receives the factor by which each row of `gradient` has been multiplied, see
            `LARGEST_BITS`; None for a gradient as it is.

    Returns:
        (len(TOKEN_METRICS),) sums in float64.
    """

    def metrics_of(block: slice, logits: Tensor, labels: Tensor, scratch: Tensor):
        teacher_logits = None if teacher is None else teacher_head.finish_(teacher[block])  # (r, V)
        with_gradient = gradient is not None
        return block_metrics(logits, teacher_logits, labels, objective, with_gradient, scratch)

    return in_blocks(
        metrics_of, block_rows(student), SCRATCH, student, labels, student_head, gradient, scales
    )


def block_rows(logits: Tensor) -> int:
    """Rows per block of logits (n, V) that fit a processor's cache."""
    return min(len(logits), max(1, BLOCK_ELEMENTS // logits.shape[1]))


def in_blocks(
    metrics_of: Callable[[slice, Tensor, Tensor, Tensor], tuple[dict[str, Tensor], Tensor | None]],
    rows: int,
    scratch_blocks: int,
    student: Tensor,
    labels: Tensor,
    student_head: Head,
    gradient: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Apply `metrics_of` to blocks of `rows` tokens of a tile; see `tile_metrics`.

    Args:
        metrics_of: Called with the block's slice of the tile, its logits (r, V), its labels (r, 1)
            and scratch (scratch_blocks, r, V). Returns what `block_metrics` returns.
        rows: Rows per block.
        scratch_blocks: Number of (r, V) scratch tensors.
        student: (n, V) product of the student's head; overwritten.
        labels: (n,) target ids.
        student_head: Finishes the student's product.
        gradient: (n, V) to be filled, or None.
        scales: (n,) to be filled, or None.

    Returns:
        (len(TOKEN_METRICS),) sums in float64.
    """
    sums = torch.zeros(len(TOKEN_METRICS), dtype=torch.float64, device=student.device)
    n, vocab_size = student.shape
    scratch = student.new_empty(scratch_blocks, rows, vocab_size)
    for start in range(0, n, rows):
        block = slice(start, min(start + rows, n))
        logits = student_head.finish_(student[block])  # (r, V)
        part = scratch[:, : block.stop - block.start]
        metrics, logits_gradient = metrics_of(block, logits, labels[block, None], part)
        metrics["tokens"] = torch.ones_like(metrics["cross_entropy"])
        ordered = torch.stack([metrics[name] for name in TOKEN_METRICS])  # (metrics, r)
        sums += ordered.sum(-1, dtype=torch.float64)
        if gradient is not None:
            found = student_head.unfinish_(logits_gradient, logits)
            store(found, gradient[block], None if scales is None else scales[block])
    return sums


def store(found: Tensor, gradient: Tensor, scales: Tensor | None) -> None:
    """Round a block's gradient `found` (r, V) to the dtype of `gradient` (r, V).

    With `scales` (r,), multiplies each row by a power of two beforehand, and stores it there.
    Overwrites `found`.
    """
    if scales is not None:
        largest = torch.linalg.vector_norm(found, torch.inf, -1)  # (r,), without another (r, V)
        scales.copy_((LARGEST_BITS - largest.log2().floor_()).clamp_(max=SCALE_BITS).exp2_())
        found.mul_(scales[:, None])
    gradient.copy_(found)


def block_metrics(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    objective: Objective,
    with_gradient: bool,
    scratch: Tensor,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute a block's metrics and the gradient of its loss from logits.

    Args:
        student: (r, V) logits.
        teacher: (r, V) logits, or None.
        labels: (r, 1) target ids.
        objective: The loss.
        with_gradient: Whether to compute the gradient.
        scratch: (SCRATCH, r, V); the gradient lies in it.

    Returns:
        The TOKEN_METRICS by name except `tokens`, (r,) each, and the gradient with respect to the
        student's logits, (r, V).
    """
    log_p, p, log_q, q, spare, at_one = scratch
    temperature = objective.temperature
    student_argmax = probabilities(student, log_q, at_one)  # (r, 1)
    cross_entropy = -log_q.gather(-1, labels)[:, 0]
    student_entropy = entropy(at_one, log_q, spare)
    zero = torch.zeros_like(cross_entropy)
    divergence = teacher_cross_entropy = label_probability = agreement = teacher_entropy = zero
    gradient = None
    if teacher is not None:
        teacher_argmax = probabilities(teacher, log_p, p)  # (r, 1)
        teacher_cross_entropy = -log_p.gather(-1, labels)[:, 0]
        label_probability = p.gather(-1, labels)[:, 0]
        teacher_entropy = entropy(p, log_p, spare)
        agreement = (teacher_argmax == student_argmax)[:, 0].to(cross_entropy)
        if temperature == 1.0:
            q = at_one
        else:
            probabilities(teacher, log_p, p, temperature, teacher_argmax)
            probabilities(student, log_q, q, temperature, student_argmax)
        closed_form, mixture = CLOSED_FORMS[objective.divergence], objective.mixture.values()
        value, gradient = closed_form(log_p, log_q, p, q, spare, *mixture)
        divergence = value[:, 0] * objective.divergence_scale
    if with_gradient:
        gradient = loss_gradient(gradient, at_one, labels, objective)
    metrics = {
        "cross_entropy": cross_entropy,
        "divergence": divergence,
        "teacher_cross_entropy": teacher_cross_entropy,
        "teacher_label_probability": label_probability,
        "top1_agreement": agreement,
        "student_entropy": student_entropy,
        "teacher_entropy": teacher_entropy,
    }
    return metrics, gradient


def probabilities(
    logits: Tensor, log_p: Tensor, p: Tensor, temperature: float = 1.0, top: Tensor | None = None
) -> Tensor:
    """Fill log_p and p, (r, V) each, from logits (r, V) / temperature.

    One exponential per id and no second search for the maximum: half of softmax plus log_softmax.
    Returns the argmax ids, (r, 1), which may be passed as `top`.
    """
    top = argmax(logits) if top is None else top
    # First, because the quotient and the normalizer would take the digits of large logits.
    torch.sub(logits, logits.gather(-1, top), out=log_p)
    if temperature != 1.0:
        log_p.div_(temperature)
    total = torch.exp(log_p, out=p).sum(-1, keepdim=True)  # at least 1
    p.div_(total)
    log_p.sub_(total.log_())
    return top


def scaled_logits(logits: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Return (logits - the largest of each row) / temperature, (r, V), without loss of digits."""
    return torch.sub(logits, logits.amax(-1, keepdim=True), out=out).div_(temperature)


def entropy(p: Tensor, log_p: Tensor, out: Tensor) -> Tensor:
    """-sum p log p in nats, (r,), of p and log_p (r, V), where 0 * -inf counts as 0.

    Overwrites `out` (r, V), which may be `log_p`.
    """
    value = -vecdot(p, log_p)
    if value.is_cuda or value.isnan().any():  # a CPU looks first: few logits are infinite
        value = -vecdot(p, torch.clamp(log_p, min=torch.finfo(p.dtype).min, out=out))
    return value


def argmax(logits: Tensor) -> Tensor:
    """Return the ids of the largest of logits (r, V), (r, 1); the first of equal ones.

    On a CPU, PyTorch finds a maximum fast but its position slowly. So this finds the maximum of
    each stretch of ids, and the position only within the first stretch that holds the largest.
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


def loss_gradient(
    divergence_gradient: Tensor | None, q: Tensor, labels: Tensor, objective: Objective
) -> Tensor:
    """Combine the gradients of divergence and cross-entropy as the objective weighs them.

    Args:
        divergence_gradient: (r, V) with respect to logits / temperature; overwritten. Not needed
            at soft_weight 0.
        q: (r, V) student probabilities at temperature 1; overwritten. Not needed at soft_weight 1.
        labels: (r, 1) target ids.
        objective: The loss.

    Returns:
        (r, V) gradient of the loss with respect to the logits, in the memory of an argument.
    """
    weight = objective.soft_weight
    if weight == 0.0:
        gradient = q
    else:
        factor = weight * objective.divergence_scale / objective.temperature
        gradient = divergence_gradient if factor == 1.0 else divergence_gradient.mul_(factor)
        if weight == 1.0:
            return gradient
        gradient.add_(q, alpha=1 - weight)
    return gradient.scatter_add_(-1, labels, torch.full_like(labels, weight - 1, dtype=q.dtype))


def class_divergence(log_p: Tensor, log_q: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Compute the divergence between distributions over K classes, which need no shared scratch.

    Args:
        log_p: (r, K) log-probabilities of the teacher at the objective's temperature; overwritten.
        log_q: (r, K) of the student; overwritten.
        objective: The loss.

    Returns:
        The value, (r, 1), and its gradient with respect to the student's class logits, (r, K).
    """
    closed_form = CLOSED_FORMS[objective.divergence]
    spare = torch.empty_like(log_p)
    return closed_form(log_p, log_q, log_p.exp(), log_q.exp(), spare, *objective.mixture.values())
