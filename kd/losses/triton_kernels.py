"""The work of elementwise.py on CUDA: one Triton kernel per tile, one program per token.

V vocabulary; L lanes, each of four neighbouring ids; p is the teacher, q the student; d as in
kd.losses.divergences. A program passes over its row of logits two or three times. The first pass
computes both softmax normalizers, the second the divergence and sum q d, the last writes the
gradient. Forward KL and soft cross-entropy do not need the sum, so they skip the second pass.
Every lane keeps sums of its own, which are reduced once after a pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kd.losses.elementwise import LARGEST_BITS, SCALE_BITS
from kd.losses.head import Head, padded_width
from kd.losses.metrics import TOKEN_METRICS
from kd.settings.distillation import Objective

BLOCK = 1024  # ids per step of a pass
WARPS = 8
VECTOR = tl.constexpr(4)  # neighbouring ids of a lane: one load of 16 bytes

KERNEL_DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
)
"""The divergences that `_terms` computes; the others run through elementwise.py."""

# Rows of the kernel's (metrics, n) output.
CROSS_ENTROPY = tl.constexpr(TOKEN_METRICS.index("cross_entropy"))
DIVERGENCE_SUM = tl.constexpr(TOKEN_METRICS.index("divergence"))
TEACHER_CROSS_ENTROPY = tl.constexpr(TOKEN_METRICS.index("teacher_cross_entropy"))
LABEL_PROBABILITY = tl.constexpr(TOKEN_METRICS.index("teacher_label_probability"))
AGREEMENT = tl.constexpr(TOKEN_METRICS.index("top1_agreement"))
STUDENT_ENTROPY = tl.constexpr(TOKEN_METRICS.index("student_entropy"))
TEACHER_ENTROPY = tl.constexpr(TOKEN_METRICS.index("teacher_entropy"))
COUNT = tl.constexpr(TOKEN_METRICS.index("tokens"))
LARGEST = tl.constexpr(float(LARGEST_BITS))
MOST = tl.constexpr(float(SCALE_BITS))


def tile_metrics(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    student_head: Head,
    teacher_head: Head | None,
    objective: Objective,
    gradient: Tensor | None,
    scales: Tensor | None,
) -> Tensor:
    """Compute the metric sums of a tile and fill `gradient`, as `elementwise.tile_metrics` does.

    Takes float32 products `student` and `teacher` (n, V), labels (n,), a gradient (n, V) and
    `scales` (n,), or None. Leaves the products as they are, unless `gradient` shares the memory of
    `student`. Where the rows of all three are `padded_width` apart, it reads and writes whole
    vectors, and sets what follows V in a row of `gradient` to 0. Returns (len(TOKEN_METRICS),) sums
    in float64.
    """
    assert objective.divergence in KERNEL_DIVERGENCES
    n, vocab_size = student.shape
    rows = [student, teacher, gradient]
    nearest = min(x.stride(0) for x in rows if x is not None)
    width = padded_width(vocab_size) if padded_width(vocab_size) <= nearest else vocab_size
    metrics = torch.zeros(len(TOKEN_METRICS), n, device=student.device)
    teacher_head = teacher_head or student_head
    weight = objective.soft_weight
    _tile_kernel[(n,)](
        student,
        student if teacher is None else teacher,
        labels,
        student if gradient is None else gradient,
        scales,
        metrics,
        student_head.bias,
        teacher_head.bias,
        n,
        student.stride(0),
        student.stride(0) if teacher is None else teacher.stride(0),
        student.stride(0) if gradient is None else gradient.stride(0),
        student_head.scale,
        student_head.softcap or 1.0,
        teacher_head.scale,
        teacher_head.softcap or 1.0,
        1 / objective.temperature,
        next(iter(objective.mixture.values()), 0.5),
        weight * objective.divergence_scale / objective.temperature,
        1 - weight,
        DIVERGENCE=objective.divergence,
        TEACHER=teacher is not None,
        WARM=teacher is not None and objective.temperature != 1.0,
        GRADIENT=gradient is not None,
        SOFT=weight > 0.0,
        HARD=weight < 1.0,
        STUDENT_SOFTCAP=student_head.softcap is not None,
        TEACHER_SOFTCAP=teacher_head.softcap is not None,
        VOCAB_SIZE=vocab_size,
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    sums = metrics.sum(-1, dtype=torch.float64)
    sums[TOKEN_METRICS.index("divergence")] *= objective.divergence_scale
    return sums


@triton.jit
def _ids(start, BLOCK: tl.constexpr):
    """Return the ids of a step, (L, 4): four neighbours in each lane."""
    lanes = tl.arange(0, BLOCK // VECTOR)[:, None]
    return start + VECTOR * lanes + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _logits(
    row, bias, ids, scale, softcap, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute the logits of `ids` from a row of a head's product; -inf from SIZE on."""
    z = tl.load(row + ids, mask=ids < WIDTH, other=0.0)
    if bias is not None:
        z += tl.load(bias + ids, mask=ids < SIZE, other=0.0).to(tl.float32)
    z = z * scale
    if SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return tl.where(ids < SIZE, z, -float("inf"))


@triton.jit
def _fold(z, ids, top, total, moment, warm, best, inverse_temperature, WARM: tl.constexpr):
    """Update each lane's max, sum e, sum e (z - max), sum exp((z - max) / T) and argmax.

    Here e = exp(z - max). Takes z and ids (L, 4); the rest has shape (L,).
    """
    z_top = tl.max(z, 1)
    place = tl.min(tl.where(z == z_top[:, None], ids, 2147483647), 1)
    best = tl.where(z_top > top, place, best)
    new = tl.maximum(top, z_top)
    shift = _shift(top, new, total)
    z -= tl.where(new == -float("inf"), 0.0, new)[:, None]  # all logits so far may be -inf
    e = tl.exp(z)
    moment = tl.exp(shift) * (moment + shift * total) + tl.sum(tl.where(e == 0.0, 0.0, e * z), 1)
    total = tl.exp(shift) * total + tl.sum(e, 1)
    if WARM:
        rescaled = warm * tl.exp(shift * inverse_temperature)
        warm = rescaled + tl.sum(tl.exp(z * inverse_temperature), 1)
    return new, total, moment, warm, best


@triton.jit
def _merge(top, total, moment, warm, best, inverse_temperature):
    """Reduce the results of `_fold`, (L,) each, to those of the row."""
    all_top = tl.max(top, 0)
    best = tl.min(tl.where(top == all_top, best, 2147483647), 0)
    shift = _shift(top, all_top, total)
    moment = tl.sum(tl.exp(shift) * (moment + shift * total), 0)
    total = tl.sum(tl.exp(shift) * total, 0)
    return all_top, total, moment, tl.sum(tl.exp(shift * inverse_temperature) * warm, 0), best


@triton.jit
def _shift(top, new, total):
    """Return top - new, finite because 0 * -inf is NaN, and 0 where nothing was summed."""
    return tl.where(total > 0.0, tl.maximum(top - new, -1e30), 0.0)


@triton.jit
def _terms(log_p, log_q, p, q, mixture, DIVERGENCE: tl.constexpr):
    """Return the terms whose sum over V is the divergence, and d up to a constant.

    0 times an infinity counts as 0; so d is 0 where q is, and with it the gradient q (d - sum q d).
    """
    tiny = 1.1754943508222875e-38
    if DIVERGENCE == "forward_kl":  # its gradient is q - p
        value = tl.where(p == 0.0, 0.0, p * (log_p - log_q))
        d = value
    elif DIVERGENCE == "reverse_kl":
        d = tl.where(q == 0.0, 0.0, log_q - log_p)
        value = q * d
    elif DIVERGENCE == "jensen_shannon":
        log_m = tl.log(tl.maximum(mixture * p + (1 - mixture) * q, tiny))
        d = tl.where(q == 0.0, 0.0, (1 - mixture) * (log_q - log_m))
        value = tl.where(p == 0.0, 0.0, mixture * p * (log_p - log_m)) + q * d
    elif DIVERGENCE == "skew_forward_kl":
        m = tl.maximum(mixture * p + (1 - mixture) * q, tiny)
        value = tl.where(p == 0.0, 0.0, p * (log_p - tl.log(m)))
        d = (mixture - 1) * (p / m)
    elif DIVERGENCE == "skew_reverse_kl":
        m = tl.maximum(mixture * q + (1 - mixture) * p, tiny)
        gap = tl.where(q == 0.0, 0.0, log_q - tl.log(m))
        value = q * gap
        d = gap - mixture * (q / m)
    elif DIVERGENCE == "total_variation":
        value = tl.abs(p - q) / 2
        d = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    else:  # soft_cross_entropy, whose gradient is q - p
        value = tl.where(p == 0.0, 0.0, -p * log_q)
        d = value
    return value, d


@triton.jit
def _row_scale(divergence, soft_factor, hard_factor, factor, SIMPLE: tl.constexpr):
    """Return the power of two for a row of a float16 gradient, from a bound of its elements.

    Elements of q - p are at most 1. For the other divergences, |q (d - sum q d)| is at most
    divergence + 2. Reverse KL, of value D = sum q d: q_i d_i <= D + sum_j q_j max(-d_j, 0), and
    q (-d) = q log(p / q) <= p - q <= p, so that the sum is at most 1. Skew reverse KL is the same
    with the mixture for p, and an additional term of at most 1; the others are bounded by 1.
    """
    bound = soft_factor if SIMPLE else soft_factor * (divergence + 2.0)
    bound = (bound + hard_factor) * tl.abs(factor)
    return tl.exp2(tl.minimum(-tl.floor(tl.log2(bound)) + LARGEST, MOST))


@triton.jit(do_not_specialize=["n"])  # n of the last tile varies; do not recompile for it
def _tile_kernel(
    student,
    teacher,
    labels,
    gradient,
    scales,
    metrics,
    student_bias,
    teacher_bias,
    n,
    stride,
    teacher_stride,
    gradient_stride,
    student_scale,
    student_softcap,
    teacher_scale,
    teacher_softcap,
    inverse_temperature,
    mixture,
    soft_factor,
    hard_factor,
    DIVERGENCE: tl.constexpr,
    TEACHER: tl.constexpr,
    WARM: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFT: tl.constexpr,
    HARD: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,  # a constant, because the interpreter takes no tensor in range
    WIDTH: tl.constexpr,  # of the rows in memory, so that no mask divides a vector
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    q_row, p_row = student + token * stride, teacher + token * teacher_stride
    label = tl.load(labels + token)
    # The gradient is q - p, without sum q d.
    SIMPLE: tl.constexpr = (DIVERGENCE == "forward_kl") or (DIVERGENCE == "soft_cross_entropy")
    LANES: tl.constexpr = BLOCK // VECTOR

    # Lanes keep their own sums, so that a step needs no exchange between threads.
    zeros, lowest = tl.zeros([LANES], tl.float32), tl.full([LANES], -float("inf"), tl.float32)
    q_top, q_total, q_moment, q_warm, q_best = lowest, zeros, zeros, zeros, zeros.to(tl.int32)
    p_top, p_total, p_moment, p_warm, p_best = lowest, zeros, zeros, zeros, zeros.to(tl.int32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        ids = _ids(start, BLOCK)
        z = _logits(
            q_row, student_bias, ids, student_scale, student_softcap, STUDENT_SOFTCAP,
            VOCAB_SIZE, WIDTH,
        )  # fmt: skip
        q_top, q_total, q_moment, q_warm, q_best = _fold(
            z, ids, q_top, q_total, q_moment, q_warm, q_best, inverse_temperature, WARM
        )
        if TEACHER:
            z = _logits(
                p_row, teacher_bias, ids, teacher_scale, teacher_softcap, TEACHER_SOFTCAP,
                VOCAB_SIZE, WIDTH,
            )  # fmt: skip
            p_top, p_total, p_moment, p_warm, p_best = _fold(
                z, ids, p_top, p_total, p_moment, p_warm, p_best, inverse_temperature, WARM
            )
    q_top, q_total, q_moment, q_warm, q_best = _merge(
        q_top, q_total, q_moment, q_warm, q_best, inverse_temperature
    )

    q_log_total = tl.log(q_total)
    at_label = _logits(
        q_row, student_bias, label, student_scale, student_softcap, STUDENT_SOFTCAP,
        VOCAB_SIZE, WIDTH,
    )  # fmt: skip
    tl.store(metrics + n * CROSS_ENTROPY + token, q_log_total - (at_label - q_top))
    tl.store(metrics + n * STUDENT_ENTROPY + token, q_log_total - q_moment / q_total)
    tl.store(metrics + n * COUNT + token, 1.0)
    # log softmax(z / T) = (z - top) / T - norm. This order loses no digits to a large top.
    q_norm = tl.log(q_warm) if WARM else q_log_total
    p_norm = q_norm
    if TEACHER:
        p_top, p_total, p_moment, p_warm, p_best = _merge(
            p_top, p_total, p_moment, p_warm, p_best, inverse_temperature
        )
        p_log_total = tl.log(p_total)
        at_label = _logits(
            p_row, teacher_bias, label, teacher_scale, teacher_softcap, TEACHER_SOFTCAP,
            VOCAB_SIZE, WIDTH,
        )  # fmt: skip
        hard = p_log_total - (at_label - p_top)
        tl.store(metrics + n * TEACHER_CROSS_ENTROPY + token, hard)
        tl.store(metrics + n * LABEL_PROBABILITY + token, tl.exp(-hard))
        tl.store(metrics + n * AGREEMENT + token, tl.where(p_best == q_best, 1.0, 0.0))
        tl.store(metrics + n * TEACHER_ENTROPY + token, p_log_total - p_moment / p_total)
        p_norm = tl.log(p_warm) if WARM else p_log_total

    divergences, centre = zeros, 0.0
    if TEACHER and not (SIMPLE and GRADIENT and SOFT):
        centres = zeros
        for start in range(0, VOCAB_SIZE, BLOCK):
            ids = _ids(start, BLOCK)
            z = _logits(
                q_row, student_bias, ids, student_scale, student_softcap, STUDENT_SOFTCAP,
                VOCAB_SIZE, WIDTH,
            )  # fmt: skip
            y = _logits(
                p_row, teacher_bias, ids, teacher_scale, teacher_softcap, TEACHER_SOFTCAP,
                VOCAB_SIZE, WIDTH,
            )  # fmt: skip
            log_q = (z - q_top) * inverse_temperature - q_norm
            log_p = (y - p_top) * inverse_temperature - p_norm
            q = tl.exp(log_q)
            value, d = _terms(log_p, log_q, tl.exp(log_p), q, mixture, DIVERGENCE)
            divergences += tl.sum(value, 1)
            centres += tl.sum(q * d, 1)
        centre = tl.sum(centres, 0)

    if GRADIENT:
        out = gradient + token * gradient_stride
        factor = student_scale
        if scales is not None:
            scale = _row_scale(
                tl.sum(divergences, 0), soft_factor, hard_factor, student_scale, SIMPLE
            )
            tl.store(scales + token, scale)
            factor = student_scale * scale
        for start in range(0, VOCAB_SIZE, BLOCK):
            ids = _ids(start, BLOCK)
            z = _logits(
                q_row, student_bias, ids, student_scale, student_softcap, STUDENT_SOFTCAP,
                VOCAB_SIZE, WIDTH,
            )  # fmt: skip
            g = tl.zeros([LANES, VECTOR], tl.float32)
            if SOFT:
                y = _logits(
                    p_row, teacher_bias, ids, teacher_scale, teacher_softcap, TEACHER_SOFTCAP,
                    VOCAB_SIZE, WIDTH,
                )  # fmt: skip
                log_q = (z - q_top) * inverse_temperature - q_norm
                log_p = (y - p_top) * inverse_temperature - p_norm
                q, p = tl.exp(log_q), tl.exp(log_p)
                value, d = _terms(log_p, log_q, p, q, mixture, DIVERGENCE)
                if SIMPLE:
                    divergences += tl.sum(value, 1)
                    g = soft_factor * (q - p)
                else:
                    g = soft_factor * q * (d - centre)
            if HARD:
                g += hard_factor * (
                    tl.exp((z - q_top) - q_log_total) - tl.where(ids == label, 1.0, 0.0)
                )
            if STUDENT_SOFTCAP:
                g = g * (1 - (z / student_softcap) * (z / student_softcap))
            g = tl.where(ids < VOCAB_SIZE, g * factor, 0.0)  # the products read whole rows
            tl.store(out + ids, g.to(gradient.dtype.element_ty), mask=ids < WIDTH)

    if TEACHER:
        tl.store(metrics + n * DIVERGENCE_SUM + token, tl.sum(divergences, 0))
