"""Divergences between a teacher's and a student's next-token distribution: the reference.

Plain functions of logits, (N, V) each, to one value a token, (N,). N target tokens, V vocabulary.
p is the teacher, q the student, both softmax(logits / temperature). All but soft_cross_entropy are
0 at equality and never negative. They keep the type they are given: the tests call them in float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum p (log p - log q). Hinton, Vinyals and Dean 2015 up to p's entropy."""
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    return _kl(log_p, log_q)


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum q (log q - log p). MiniLLM, Gu et al. 2024, equation 1."""
    return forward_kl(student, teacher, temperature)


def jensen_shannon(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, weight: float = 0.5
) -> Tensor:
    """w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q, 0 < w < 1.

    Agarwal et al. 2024 (GKD), section 2; w = 1/2 is the symmetric one, at most log 2.
    """
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    log_m = _log_mixture(log_p, log_q, weight)
    return weight * _kl(log_p, log_m) + (1 - weight) * _kl(log_q, log_m)


def skew_forward_kl(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(p || skew p + (1 - skew) q), at most -log skew. DistiLLM, Ko et al. 2024, section 3.1."""
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


def skew_reverse_kl(
    teacher: Tensor, student: Tensor, temperature: float = 1.0, skew: float = 0.1
) -> Tensor:
    """KL(q || skew q + (1 - skew) p). DistiLLM, Ko et al. 2024, section 3.1."""
    return skew_forward_kl(student, teacher, temperature, skew)


def total_variation(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """sum |p - q| / 2, at most 1. Wen et al. 2023 (f-distill), section 3.2."""
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    return (p - q).abs().sum(-1) / 2


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log q = KL(p || q) + entropy(p): same gradient as forward_kl, not 0 at equality."""
    p = torch.softmax(teacher / temperature, -1)
    return -_expectation(p, log_softmax(student / temperature, -1))


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p, in nats."""
    log_p = log_softmax(logits, -1)
    return -_expectation(log_p.exp(), log_p)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), also where both are too small for their type."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return _expectation(a, log_a) - _expectation(a, log_b)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over V, where 0 * -inf counts as 0, and NaN stays NaN."""
    return torch.where(p == 0, torch.zeros_like(p), p * x).sum(-1)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "soft_cross_entropy": soft_cross_entropy,
}
