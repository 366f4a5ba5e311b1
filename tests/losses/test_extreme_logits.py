"""Infinite and large logits give what float64 gives, for whole, cached and aligned teachers."""

import pytest
import torch
from oracle import Problem, metrics_by_name
from test_cross_tokenizer import one_to_one
from test_sparse import cached
from torch import Tensor

from kd.losses.divergences import DIVERGENCES
from kd.losses.fused import linear_distillation_loss
from kd.losses.head import Head
from kd.settings.distillation import Objective

EXCLUDED = 2  # ids


def fused(kind: str, problem: Problem, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and its metrics, with a teacher of the problem's own tokenizer."""
    teacher = problem.teacher
    if kind == "cached":
        teacher = cached(problem, problem.real - EXCLUDED, objective.temperature)
    if kind == "aligned":
        teacher = one_to_one(problem)
    loss, sums = linear_distillation_loss(
        problem.hidden, problem.labels, problem.head, objective, problem.real, teacher
    )
    return loss, metrics_by_name(sums)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["whole", "cached", "aligned"])
def test_ids_that_both_models_exclude_change_nothing(kind, divergence):
    """Their logits are -inf; 0 times infinity is 0. A cached teacher's tail is then empty."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        objective = Objective(0.5, divergence, 2.0)
        without = Problem(9, 51, bias=True).to(dtype).to(torch.float64)
        truth, expected = without.expected(objective)
        wanted = torch.autograd.grad(truth, without.hidden)[0]
        problem = Problem(9, 51, bias=True).to(dtype)
        problem.real += EXCLUDED
        for head in (problem.head, problem.teacher.head):
            head.bias.detach()[without.real : problem.real] = -torch.inf
        loss, found = fused(kind, problem, objective)
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
        gradient = torch.autograd.grad(loss, problem.hidden)[0]
        assert (gradient - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_id_that_one_model_excludes_counts_as_in_float64(side, divergence):
    """KL(a || b) is infinite, and not NaN, where b is 0 and a is not."""
    problem = Problem(9, bias=True)
    head = problem.head if side == "student" else problem.teacher.head
    unused = next(i for i in range(problem.real) if i not in problem.labels)
    head.bias.detach()[unused] = -torch.inf
    for temperature in (1.0, 2.0):
        objective = Objective(0.5, divergence, temperature)
        loss, found = fused("whole", problem, objective)
        truth, expected = problem.expected(objective)
        assert found == pytest.approx(expected, rel=1e-10)
        if truth.isfinite():
            pairs = (torch.autograd.grad(x, problem.hidden)[0] for x in (loss, truth))
            torch.testing.assert_close(*pairs, rtol=1e-9, atol=1e-10)
    infinite = {"student": ("forward_kl", "soft_cross_entropy"), "teacher": ("reverse_kl",)}
    assert loss.isinf() == (divergence in infinite[side])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["whole", "cached", "aligned"])
def test_large_logits_lose_no_digits(kind, temperature):
    """A student close to its teacher, with logits near 3 000, whose last bit is 2e-4."""
    tokens, real = 16, 400
    problem = Problem(tokens, real, 0, 0, tokens, tokens, trained_head=False, scale=1.0)
    weight = 3000 + 2 * problem.teacher.head.weight
    weights = [w.detach().float() for w in (weight + 0.01 * problem.head.weight, weight)]
    problem.head, problem.teacher.head = (Head(w) for w in weights)
    # With these states, the logits are the weights, which float32 products do not round.
    problem.hidden = torch.eye(tokens).requires_grad_()
    problem.teacher.hidden = torch.eye(tokens)
    exact = problem.to(torch.float64)
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        objective = Objective(1.0, divergence, temperature)
        _, found = fused(kind, problem, objective)
        _, expected = fused(kind, exact, objective)
        for name in ("divergence", "cross_entropy", "student_entropy"):
            assert abs(found[name] - expected[name]) < 5e-7 * tokens, name
