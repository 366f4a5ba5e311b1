"""The loss over k + 1 classes: equal to float64 autograd, and compared with the whole loss."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Problem, distance, metrics_by_name
from test_fused import OBJECTIVES, PROBLEMS, Products
from torch import Tensor

from kd.losses import elementwise, fused
from kd.losses.divergences import DIVERGENCES, entropy
from kd.losses.fused import linear_distillation_loss
from kd.losses.sparse import SparseTeacherOutputs
from kd.settings.distillation import Objective


def cached(problem: Problem, k: int, temperature: float = 1.0) -> SparseTeacherOutputs:
    """Return what a cache would hold, in the problem's dtype."""
    teacher = problem.logits()[0].detach()
    log_p = (teacher / temperature).log_softmax(-1)
    top, ids = log_p.topk(k)
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1) if k < problem.real else None
    cold = teacher.log_softmax(-1)
    label = cold.gather(-1, problem.labels[:, None])[:, 0]
    return SparseTeacherOutputs(ids, top, tail, label, entropy(teacher))


def fused_loss(problem: Problem, objective: Objective, k: int) -> tuple[Tensor, Tensor]:
    outputs = cached(problem, k, objective.temperature)
    return linear_distillation_loss(
        problem.hidden, problem.labels, problem.head, objective, problem.real, outputs
    )


def merged(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities of the classes, (N, k + 1): the ids, and the sum of all others."""
    p = (logits / temperature).softmax(-1)
    classes = p.gather(-1, ids)
    if ids.shape[1] == p.shape[1]:
        return classes.log()
    tail = torch.ones_like(p).scatter(-1, ids, 0.0) * p
    return torch.cat([classes, tail.sum(-1, keepdim=True)], -1).log()


def reference_loss(
    problem: Problem, objective: Objective, k: int
) -> tuple[Tensor, dict[str, float]]:
    """Apply the reference divergences to the merged distributions; log p serves as logits."""
    whole = replace(objective, soft_weight=0.0)
    hard, expected = problem.expected(whole)
    teacher, student = problem.logits()
    ids = cached(problem, k, objective.temperature).ids
    classes = [merged(logits, ids, objective.temperature) for logits in (teacher, student)]
    divergence = DIVERGENCES[objective.divergence]
    soft = divergence(*classes, **objective.mixture).sum() * objective.divergence_scale
    loss = objective.soft_weight * soft + (1 - objective.soft_weight) * hard
    return loss, expected | {"divergence": soft.item()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@given(problem=PROBLEMS, objective=OBJECTIVES, k=st.sampled_from([1, 3, 20, 52, 53]))
@settings(deadline=None, max_examples=60)
def test_loss_gradients_and_metrics_equal_those_of_the_merged_distributions(
    dtype, tolerance, problem, objective, k
):
    problem.magnitude = min(problem.magnitude, 1.0)
    problem.__post_init__()
    problem = problem.to(dtype)
    exact = problem.to(torch.float64)
    with patch.object(fused, "TILE", 7), patch.object(elementwise, "BLOCK_ELEMENTS", 200):
        loss, sums = fused_loss(problem, objective, k)
    truth, expected_metrics = reference_loss(exact, objective, k)
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance, abs=tolerance)
    for name, found in metrics_by_name(sums).items():
        if name != "top1_agreement" or dtype == torch.float64:
            assert found == pytest.approx(expected_metrics[name], rel=tolerance, abs=tolerance), (
                name
            )
    found = torch.autograd.grad(3 * loss, problem.trained)
    expected = torch.autograd.grad(3 * truth, exact.trained)
    # Where a gradient cancels, the rounding error of its terms remains, times 1 / temperature.
    floor = 1.0 if dtype == torch.float64 else max(1.0, 1 / objective.temperature)
    for actual, target in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        assert (actual - target).norm() < tolerance * (target.norm() + floor)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_ids_the_loss_equals_that_of_the_whole_vocabulary(divergence, temperature):
    """Within 1e-6 in float32, for every trained tensor and all metrics."""
    problem = Problem(bias=True).to(torch.float32)
    objective = Objective(0.7, divergence, temperature)
    whole, whole_sums = problem.fused(objective)
    loss, sums = fused_loss(problem, objective, problem.real)
    assert distance(loss, whole) < 1e-6 and distance(sums, whole_sums) < 1e-6
    found = torch.autograd.grad(loss, problem.trained)
    expected = torch.autograd.grad(whole, problem.trained)
    for actual, target in zip(found, expected, strict=True):
        assert distance(actual, target) < 1e-6


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name[:4] != "soft"])
def test_more_ids_raise_the_divergence_up_to_that_of_the_whole_vocabulary(divergence):
    """The data processing inequality: merging classes lowers a divergence."""
    problem = Problem()
    losses = [
        fused_loss(problem, Objective(1.0, divergence), k)[0].item() for k in (1, 4, 16, 40, 53)
    ]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    whole, _ = problem.fused(Objective(1.0, divergence))
    assert losses[-1] == pytest.approx(whole.item(), rel=1e-10)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name[:4] != "soft"])
def test_a_student_equal_to_its_teacher_has_zero_divergence_and_zero_gradient(divergence):
    problem = Problem(width=20, student_padding=16, trained_head=False).to(torch.float32)
    problem.head = replace(problem.teacher.head, scale=problem.head.scale)
    problem.hidden = problem.teacher.hidden.clone().requires_grad_()
    loss, _ = fused_loss(problem, Objective(1.0, divergence), 8)
    (gradient,) = torch.autograd.grad(loss, problem.hidden)
    assert abs(loss.item()) < 1e-4
    # |p - q| has a kink at equality, where rounding decides which way.
    assert divergence == "total_variation" or gradient.abs().max() < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tail_that_underflows_in_float32_still_gets_a_gradient(divergence):
    """With logits near 10 000, the student's tail is 0 in float32 and the teacher's is not."""
    problem = Problem(magnitude=2000.0, trained_head=False).to(torch.float32)
    loss, sums = fused_loss(problem, Objective(0.5, divergence), 5)
    (gradient,) = torch.autograd.grad(loss, problem.hidden)
    assert sums.isfinite().all() and gradient.isfinite().all() and gradient.any()


def test_rounded_log_probabilities_are_normalized_again():
    """Otherwise the gradient of forward KL would not sum to 0 over the vocabulary."""
    problem = Problem(trained_head=False)
    outputs = cached(problem, 9)
    rounded = replace(
        outputs,
        log_probabilities=outputs.log_probabilities.half() + 0.01,
        log_tail=outputs.log_tail.half(),
    )
    assert (
        rounded.rows(slice(0, 50), torch.float64)
        .classes.exp()
        .sum(-1)
        .allclose(torch.ones(50, dtype=torch.float64))
    )


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("block", [1, 200, 10**6])
def test_tile_and_block_sizes_do_not_change_gradients(tile, block):
    problem, objective = Problem(bias=True).to(torch.float32), Objective(0.5, temperature=2.0)
    whole, _ = fused_loss(problem, objective, 11)
    expected = torch.autograd.grad(whole, problem.trained)
    with patch.object(fused, "TILE", tile), patch.object(elementwise, "BLOCK_ELEMENTS", block):
        tiled, _ = fused_loss(problem, objective, 11)
    found = torch.autograd.grad(tiled, problem.trained)
    assert distance(tiled, whole) < 1e-6
    for actual, target in zip(found, expected, strict=True):
        assert distance(actual, target) < 1e-6


def test_a_tile_costs_two_products_with_a_frozen_head_and_three_with_a_trained_one():
    n, real, width = fused.TILE, 53, 12
    two = [(n, real + 8), (n, width)]  # with the padding of the head
    for trained_head, expected in ((False, two), (True, [*two, (real + 8, width)])):
        problem = Problem(tokens=2 * n, trained_head=trained_head).to(torch.float32)
        outputs = cached(problem, 7)
        with Products() as products:
            loss, _ = linear_distillation_loss(
                problem.hidden, problem.labels, problem.head, Objective(0.5), real, outputs
            )
            loss.backward()
        assert products.shapes == 2 * expected


def test_without_target_tokens_the_loss_is_zero_and_differentiable():
    problem = Problem(tokens=0, bias=True)
    loss, sums = fused_loss(problem, Objective(0.5), 4)
    loss.backward()
    assert loss.item() == 0.0 and sums.sum() == 0.0
    assert problem.hidden.grad.shape == (0, problem.width)


def test_nan_in_the_student_makes_the_loss_nan():
    problem = Problem(tokens=3)
    outputs = cached(problem, 5)
    problem.hidden.detach()[1, 0] = torch.nan
    for name in DIVERGENCES:
        loss, _ = linear_distillation_loss(
            problem.hidden, problem.labels, problem.head, Objective(1.0, name), 53, outputs
        )
        assert loss.isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_loss_and_gradients_on_a_gpu_equal_float64(divergence, dtype, tolerance):
    problem = Problem(tokens=200, real=5000, width=64, bias=True, softcap=30.0).to(dtype, "cuda")
    exact, objective = problem.to(torch.float64), Objective(0.5, divergence, 2.0)
    outputs = cached(exact, 64, 2.0).to("cuda")
    loss, _ = linear_distillation_loss(
        problem.hidden, problem.labels, problem.head, objective, problem.real, outputs
    )
    truth, _ = reference_loss(exact, objective, 64)
    assert distance(loss.cpu(), truth) < 1e-4
    found = torch.autograd.grad(loss, problem.trained)
    expected = torch.autograd.grad(truth, exact.trained)
    for actual, target in zip(found, expected, strict=True):
        assert actual.dtype == dtype and distance(actual.cpu(), target) < tolerance
