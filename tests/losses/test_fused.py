"""The fused loss against float64 autograd on whole logits, and its invariances."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from kd.losses import fused
from kd.losses.divergences import DIVERGENCES
from kd.losses.fused import METRICS, Head, Objective, TeacherSignal, linear_distillation_loss

V, H, TEACHER_H, REAL = 61, 12, 20, 53  # the last 8 ids are padding of the vocabulary


def problem(n=300, dtype=torch.float64, bias=False, softcap=None):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden = normal(n, H).to(dtype).requires_grad_()
    weight = normal(V, H).to(dtype).requires_grad_()
    head = Head(weight, normal(V).to(dtype).requires_grad_() if bias else None, 0.5, softcap)
    teacher = TeacherSignal(
        normal(n, TEACHER_H).to(dtype), Head(normal(V + 8, TEACHER_H).to(dtype))
    )
    labels = torch.randint(0, REAL, (n,), generator=generator)
    return hidden, labels, head, teacher


def expected(hidden, labels, head, teacher, objective):
    """The same loss from whole (N, V) logits by plain autograd."""
    logits = hidden @ head.weight.T
    logits = (logits if head.bias is None else logits + head.bias) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits[:, :REAL]
    teacher_logits = (teacher.hidden @ teacher.head.weight.T)[:, :REAL]
    soft = DIVERGENCES[objective.divergence](teacher_logits, logits, objective.temperature).sum()
    if objective.temperature_squared:
        soft = soft * objective.temperature**2
    hard = cross_entropy(logits, labels, reduction="sum")
    return objective.soft_weight * soft + (1 - objective.soft_weight) * hard


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("soft_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias, softcap", [(False, None), (True, 3.0)])
def test_value_and_gradients_equal_float64_autograd(divergence, soft_weight, bias, softcap):
    objective = Objective(soft_weight, divergence, temperature=2.0, temperature_squared=True)
    hidden, labels, head, teacher = problem(bias=bias, softcap=softcap)
    trained = [x for x in (hidden, head.weight, head.bias) if x is not None]
    loss, sums = linear_distillation_loss(hidden, labels, head, objective, REAL, teacher)
    truth = expected(hidden, labels, head, teacher, objective)
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    scale = 3.0  # what a loss scale or a weight before it does
    for found, wanted in zip(
        torch.autograd.grad(loss * scale, trained),
        torch.autograd.grad(truth * scale, trained),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert sums[METRICS.index("tokens")] == len(labels)


def test_tile_size_does_not_change_the_loss(monkeypatch):
    hidden, labels, head, teacher = problem()
    objective = Objective(0.5)
    whole, _ = linear_distillation_loss(hidden, labels, head, objective, REAL, teacher)
    monkeypatch.setattr(fused, "TILE", 7)
    tiled, _ = linear_distillation_loss(hidden, labels, head, objective, REAL, teacher)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=0)


def test_no_target_token_gives_zero_with_a_gradient_path():
    hidden, labels, head, teacher = problem(n=0)
    loss, sums = linear_distillation_loss(hidden, labels, head, Objective(0.5), REAL, teacher)
    loss.backward()
    assert loss.item() == 0.0 and sums.sum() == 0.0
    assert hidden.grad.shape == (0, H) and not head.weight.grad.any()


def test_no_gradient_is_formed_under_no_grad(monkeypatch):
    called = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: called.append(a))
    hidden, labels, head, teacher = problem()
    with torch.no_grad():
        linear_distillation_loss(hidden, labels, head, Objective(0.5), REAL, teacher)
    assert not called


def test_half_precision_gradient_survives_a_loss_scale_of_65536():
    """The kept gradient is float32 and is scaled before the cast: no flush to zero in fp16."""
    hidden, labels, head, teacher = problem(n=64)
    half = hidden.detach().to(torch.float16).requires_grad_()
    half_head = Head(head.weight.detach().to(torch.float16), None, head.scale)
    tiny, scale = 1e-7, 2.0**16
    loss, _ = linear_distillation_loss(half, labels, half_head, Objective(1.0), REAL, teacher)
    (scaled,) = torch.autograd.grad(loss * tiny * scale, half)
    exact = half.detach().double().requires_grad_()
    truth_head = Head(half_head.weight.double(), None, head.scale)
    truth, _ = linear_distillation_loss(exact, labels, truth_head, Objective(1.0), REAL, teacher)
    (wanted,) = torch.autograd.grad(truth * tiny * scale, exact)
    torch.testing.assert_close(scaled.double(), wanted, rtol=2e-3, atol=1e-6)


def test_padded_ids_of_the_vocabulary_get_no_probability():
    """Raising the logits of ids that the tokenizer lacks changes nothing."""
    hidden, labels, head, teacher = problem()
    loss, _ = linear_distillation_loss(hidden, labels, head, Objective(0.5), REAL, teacher)
    louder = head.weight.detach().clone()
    louder[REAL:] += 100.0
    teacher.head.weight[REAL:] += 100.0
    again, _ = linear_distillation_loss(
        hidden, labels, Head(louder, None, head.scale), Objective(0.5), REAL, teacher
    )
    assert torch.equal(loss, again)
