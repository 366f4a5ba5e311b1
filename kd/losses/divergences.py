"""Divergences of the student's next-token distribution from the teacher's: formula and gradient.

p is the teacher, q the student, both softmax(logits / temperature). N target tokens, V vocabulary.

Each divergence has two functions. The REFERENCE is the formula as published, a plain function of
logits, (N, V) each, to one value per token, (N,). The CLOSED FORM gives the same value together
with the gradient and works in place; the fused loss uses it, because autograd would keep and fill
several more (N, V) tensors. The tests compare every closed form with autograd on its reference.

All divergences are 0 at p = q and never negative, except soft_cross_entropy. References keep the
dtype of their inputs: the tests call them in float64.

To add a divergence:
1. `Divergence` in kd/settings/distillation.py: its name, which makes it a choice in recipes. A
   parameter of its own becomes a setting of `Objective`, passed on by `Objective.mixture`.
2. This file: its reference in DIVERGENCES and its closed form in CLOSED_FORMS. It then works on CPU
   and CUDA, for full, top-k and cross-tokenizer teachers, and all tests of the losses cover it.
3. Only for speed on CUDA: a branch in `_terms` of kd/losses/triton_kernels.py and its name in
   KERNEL_DIVERGENCES. Until then CUDA uses the closed form.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import log_softmax


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum p (log p - log q). Hinton, Vinyals and Dean 2015, up to the entropy of p.

    Takes logits (N, V), returns (N,).
    """
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    return _kl(log_p, log_q)


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum q (log q - log p). MiniLLM, Gu et al. 2024, equation 1.

    Takes logits (N, V), returns (N,).
    """
    return forward_kl(student, teacher, temperature)


def jensen_shannon(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, weight: float = 0.5
) -> Tensor:
    """Generalized JSD: w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q, 0 < w < 1.

    GKD, Agarwal et al. 2024, section 2. w = 1/2 is symmetric and at most log 2. Takes logits
    (N, V), returns (N,).
    """
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    log_m = _log_mixture(log_p, log_q, weight)
    return weight * _kl(log_p, log_m) + (1 - weight) * _kl(log_q, log_m)


def skew_forward_kl(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(p || skew p + (1 - skew) q), at most -log skew. DistiLLM, Ko et al. 2024, section 3.1.

    Takes logits (N, V), returns (N,).
    """
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


def skew_reverse_kl(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(q || skew q + (1 - skew) p), at most -log skew. DistiLLM, Ko et al. 2024, section 3.1.

    Takes logits (N, V), returns (N,).
    """
    return skew_forward_kl(student, teacher, temperature, skew)


def total_variation(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Half the sum of |p - q|, at most 1. f-distill, Wen et al. 2023, section 3.2.

    Takes logits (N, V), returns (N,).
    """
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    return (p - q).abs().sum(-1) / 2


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log q = KL(p || q) + entropy(p): the gradient of forward_kl, but not 0 at p = q.

    Takes logits (N, V), returns (N,).
    """
    p = torch.softmax(teacher / temperature, -1)
    return -_masked_expectation(p, log_softmax(student / temperature, -1))


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p in nats, (N,), of logits (N, V)."""
    log_p = log_softmax(logits, -1)
    return -_masked_expectation(log_p.exp(), log_p)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), exact even where a and b underflow."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _masked_expectation(log_a.exp(), log_a - log_b)


def _masked_expectation(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p x over V, (N,), where 0 * -inf counts as 0 and NaN stays NaN."""
    return (p * x.masked_fill(p == 0, 0.0)).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "soft_cross_entropy": soft_cross_entropy,
}
"""The reference of each divergence."""


# Closed forms. Arguments: log p, log q, p and q, (r, V) each, at the objective's temperature; a
# spare (r, V) tensor; the parameter of the divergence, if it has one. Results: the value, (r, 1),
# and the gradient with respect to the student's logits / temperature, (r, V). They may overwrite
# every argument except q.
#
# With d = dD/dq, the gradient of a divergence D is q (d - sum q d). A term of d that is the same
# for all ids cancels, so it is left out below.


def _forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    value = _expectation(p, torch.sub(log_p, log_q, out=spare))
    return value, torch.sub(q, p, out=spare)


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    return -_expectation(p, log_q), torch.sub(q, p, out=spare)


def _reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    d = torch.sub(log_q, log_p, out=spare)
    value = _expectation(q, d)
    return value, d.sub_(value).mul_(q)


def _jensen_shannon(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor, weight: float
):
    log_m = _mixture(q, p, weight, spare).log_()
    kl_of_teacher = _expectation(p, log_p.sub_(log_m))
    log_ratio = log_q.sub_(log_m)  # d / (1 - weight): the derivatives through m cancel
    kl_of_student = _expectation(q, log_ratio)
    value = weight * kl_of_teacher + (1 - weight) * kl_of_student
    return value, log_ratio.sub_(kl_of_student).mul_(q).mul_(1 - weight)


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
    log_ratio = log_q.sub_(torch.log(m, out=log_p))
    value = _expectation(q, log_ratio)
    d = log_ratio.sub_(torch.div(q, m, out=m), alpha=skew)
    return value, d.sub_(_expectation(q, d)).mul_(q)


def _total_variation(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, spare: Tensor):
    difference = torch.sub(q, p, out=spare)
    sign = torch.sign(difference, out=log_q)  # 2 d
    value = _expectation(difference, sign) / 2
    return value, sign.sub_(_expectation(q, sign)).mul_(q).div_(2)


def _mixture(a: Tensor, b: Tensor, weight: float, out: Tensor) -> Tensor:
    """(1 - weight) a + weight b, kept above 0 so that its log is finite."""
    return torch.lerp(a, b, weight, out=out).clamp_min_(torch.finfo(a.dtype).tiny)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p x over V, (r, 1), without the (r, V) product in memory; 0 * inf counts as 0.

    May set x to 0 where p is 0.
    """
    value = vecdot(p, x)[:, None]
    if value.is_cuda or value.isnan().any():  # a CPU looks first: few logits are infinite
        value = vecdot(p, x.masked_fill_(p == 0, 0.0))[:, None]
    return value


CLOSED_FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "soft_cross_entropy": _soft_cross_entropy,
}
"""Value and gradient of each divergence."""
