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


def jensen_shannon(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most log 2."""
    log_p = log_softmax(teacher / temperature, -1)
    log_q = log_softmax(student / temperature, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum p log q = KL(p || q) + entropy(p): same gradient as forward_kl, not 0 at equality."""
    p = torch.softmax(teacher / temperature, -1)
    return -_expectation(p, log_softmax(student / temperature, -1))


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p, in nats."""
    log_p = log_softmax(logits, -1)
    return -_expectation(log_p.exp(), log_p)


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
}
