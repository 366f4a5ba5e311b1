"""Faults found in similar projects; each test shows that this project does not have one of them.

Faults 1 (gradient scaled by ranks or accumulation steps) and 2 (ranks that diverge) need several
processes; they are in tests/training/test_gradients.py. Fault 8 (a top-k teacher without its tail)
cannot occur: the divergence covers the whole vocabulary.
"""

import pytest
import torch
from small import CHATML, small_tokenizer
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from kd.data.encoding import IGNORE_INDEX, encode_rows
from kd.data.packing import Collator
from kd.losses.divergences import DIVERGENCES, forward_kl
from kd.losses.fused import linear_distillation_loss
from kd.losses.head import Head, TeacherOutputs
from kd.models.heads import target_positions
from kd.settings.distillation import Objective

N, H, V, REAL = 40, 16, 72, 64
CHAT = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A thing in order."},
]


def problem(dtype=torch.float64, frozen=True):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    hidden = normal(N, H).requires_grad_()
    head = Head(normal(V, H).requires_grad_(not frozen))
    teacher = TeacherOutputs(normal(N, H), Head(normal(V + 5, H)))
    return hidden, torch.randint(0, REAL, (N,), generator=generator), head, teacher


def loss_and_gradient(objective, head=None, teacher=None):
    hidden, labels, own_head, own_teacher = problem()
    inputs = (hidden, labels, head or own_head, objective, REAL, teacher or own_teacher)
    loss, _ = linear_distillation_loss(*inputs)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


def test_fault_3_temperature_squared_scales_loss_and_gradient_alike():
    plain = loss_and_gradient(Objective(1.0, temperature=3.0))
    squared = loss_and_gradient(Objective(1.0, temperature=3.0, temperature_squared=True))
    for without, with_ in zip(plain, squared, strict=True):
        torch.testing.assert_close(9.0 * without, with_, rtol=1e-12, atol=0)


def test_fault_4_forward_kl_and_its_gradient_are_zero_at_equality():
    hidden, labels, head, _ = problem()
    same = TeacherOutputs(hidden.detach(), head)
    loss, _ = linear_distillation_loss(hidden, labels, head, Objective(1.0), REAL, same)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert abs(loss.item()) < 1e-10 and gradient.abs().max() < 1e-10


def test_fault_5_a_target_is_predicted_from_the_previous_position():
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 7, 8, IGNORE_INDEX, 9]])
    positions, targets = target_positions(labels)
    assert positions.nonzero()[:, 1].tolist() == [1, 2, 4] and targets.tolist() == [7, 8, 9]


def test_fault_5_the_end_token_is_a_target_but_padding_is_not_if_both_share_an_id():
    tokenizer = small_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = CHATML, tokenizer.eos_token
    rows, _ = encode_rows([{"messages": CHAT}, {"text": "A list."}], tokenizer, 99)
    batch = Collator(tokenizer.pad_token_id)([[row] for row in rows])
    for row, labels in zip(rows, batch["labels"], strict=True):
        assert row.labels[-1 if row is rows[1] else -2] == tokenizer.eos_token_id
        assert (labels[len(row) :] == IGNORE_INDEX).all() and (
            labels != IGNORE_INDEX
        ).sum() == row.targets


@pytest.mark.parametrize("rows_of_teacher", [REAL, REAL + 3, REAL + 50])
def test_fault_6_heads_padded_to_different_sizes_give_the_loss_of_the_real_ids(
    rows_of_teacher,
):
    hidden, labels, head, teacher = problem()
    wide = torch.randn(REAL + 50, H, dtype=torch.float64)
    teacher = TeacherOutputs(teacher.hidden, Head(wide[:rows_of_teacher]))
    loss, _ = linear_distillation_loss(hidden, labels, head, Objective(1.0), REAL, teacher)
    ours = hidden @ head.weight[:REAL].T
    expected = forward_kl(teacher.hidden @ wide[:REAL].T, ours).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


class Products(TorchDispatchMode):
    """Record the rows of the first factor of each matrix product."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows.append(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen, products", [(True, 3), (False, 4)])
def test_fault_7_a_frozen_head_gets_no_gradient_and_only_targets_are_projected(frozen, products):
    hidden, labels, head, teacher = problem(torch.float32, frozen)
    with Products() as counted:
        loss, _ = linear_distillation_loss(hidden, labels, head, Objective(0.5), REAL, teacher)
        loss.backward()
    assert len(counted.rows) == products and set(counted.rows) <= {N, V}
    assert (head.weight.grad is None) == frozen


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fault_10_at_soft_weight_1_the_loss_contains_no_cross_entropy(divergence):
    hidden, labels, head, teacher = problem()
    objective = Objective(1.0, divergence)
    loss, _ = linear_distillation_loss(hidden, labels, head, objective, REAL, teacher)
    other, _ = linear_distillation_loss(hidden, labels.roll(1), head, objective, REAL, teacher)
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=0)  # the labels do not matter


def test_fault_10_at_soft_weight_0_the_loss_is_exactly_cross_entropy():
    hidden, labels, head, teacher = problem()
    loss, _ = linear_distillation_loss(hidden, labels, head, Objective(0.0), REAL, teacher)
    expected = cross_entropy(
        log_softmax(hidden @ head.weight[:REAL].T, -1), labels, reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
