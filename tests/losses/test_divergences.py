"""The reference divergences equal torch and the textbook formulas in float64."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div, log_softmax, softmax

from kd.losses.divergences import (
    CLOSED_FORMS,
    DIVERGENCES,
    entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from kd.settings.distillation import Divergence


def test_recipe_references_and_closed_forms_have_the_same_divergences():
    assert get_args(Divergence) == tuple(DIVERGENCES) == tuple(CLOSED_FORMS)


def logits(seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(5, 33, generator=generator, dtype=torch.float64)


SEEDS = st.integers(0, 10_000)
SCALES = st.sampled_from([0.01, 1.0, 30.0, 1000.0])


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "soft_cross_entropy"])
@given(seed=SEEDS, scale=SCALES, temperature=st.sampled_from([0.5, 1.0, 4.0]))
@settings(deadline=None, max_examples=40)
def test_divergences_are_zero_at_equality_and_never_negative(name, seed, scale, temperature):
    a, b = logits(seed, scale), logits(seed + 1, scale)
    divergence = DIVERGENCES[name]
    assert torch.all(divergence(a, a + 3.0, temperature).abs() < 1e-11)  # softmax ignores a shift
    assert torch.all(divergence(a, b, temperature) >= -1e-12)
    assert torch.isfinite(divergence(a, b, temperature)).all()


@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 4.0]))
@settings(deadline=None, max_examples=40)
def test_each_divergence_equals_an_independent_formula(seed, temperature):
    teacher, student = logits(seed, 2.0), logits(seed + 1, 2.0)
    log_p, log_q = (log_softmax(x / temperature, -1) for x in (teacher, student))
    p, q = softmax(teacher / temperature, -1), softmax(student / temperature, -1)
    m = (p + q) / 2

    def torch_kl(log_b, a):
        return kl_div(log_b, a, reduction="none").sum(-1)

    def mixture(a, b, weight):
        return weight * a + (1 - weight) * b

    fifth = mixture(p, q, 0.2)
    cases = [
        (forward_kl, torch_kl(log_q, p)),
        (reverse_kl, torch_kl(log_p, q)),
        (jensen_shannon, (torch_kl(m.log(), p) + torch_kl(m.log(), q)) / 2),
        (
            partial(jensen_shannon, weight=0.2),
            0.2 * torch_kl(fifth.log(), p) + 0.8 * torch_kl(fifth.log(), q),
        ),
        (partial(skew_forward_kl, skew=0.1), torch_kl(mixture(p, q, 0.1).log(), p)),
        (partial(skew_reverse_kl, skew=0.1), torch_kl(mixture(q, p, 0.1).log(), q)),
        (total_variation, (p - q).clamp(min=0).sum(-1)),
        (soft_cross_entropy, -(p * log_q).sum(-1)),
    ]
    for function, expected in cases:
        found = function(teacher, student, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_entropy_of_uniform_logits_is_the_log_of_their_number():
    uniform = torch.zeros(3, 32, dtype=torch.float64)
    torch.testing.assert_close(
        entropy(uniform), torch.full((3,), math.log(32), dtype=torch.float64)
    )


@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 4.0]))
@settings(deadline=None, max_examples=20)
def test_soft_cross_entropy_is_forward_kl_plus_the_entropy_of_the_teacher(seed, temperature):
    teacher, student = logits(seed, 2.0), logits(seed + 1, 2.0)
    found = soft_cross_entropy(teacher, student, temperature)
    expected = forward_kl(teacher, student, temperature) + entropy(teacher / temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_token_of_zero_teacher_probability_contributes_nothing():
    teacher = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    student = torch.zeros(1, 3, dtype=torch.float64)
    torch.testing.assert_close(forward_kl(teacher, student).item(), math.log(3 / 2))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_in_either_model_makes_the_divergence_nan(name):
    """A divergence of 0 would look like success."""
    good, bad = torch.zeros(1, 3), torch.full((1, 3), math.nan)
    assert DIVERGENCES[name](bad, good).isnan().all() and DIVERGENCES[name](good, bad).isnan().all()
