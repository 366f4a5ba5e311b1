"""The cross-tokenizer loss: against autograd in float64, and equal to the ordinary loss."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from losses.oracle import Problem, distance, metrics_by_name, whole_logits
from losses.segment_oracle import segment_by_segment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd.losses import elementwise, fused
from kd.losses.divergences import DIVERGENCES
from kd.losses.head import Head, padded_width
from kd.losses.metrics import TOKEN_METRICS
from kd.losses.segments import AlignedTeacherOutputs, TokenClasses
from kd.settings.distillation import Objective

DIVERGENCE_NAMES = list(DIVERGENCES)


def identity(vocab_size: int) -> TokenClasses:
    return TokenClasses.of(torch.arange(vocab_size), torch.arange(vocab_size))


def one_to_one(problem: Problem, order: Tensor | None = None) -> AlignedTeacherOutputs:
    """The problem's own teacher with renamed ids: the new id i is the old id order[i]."""
    count = problem.tokens
    order = torch.arange(problem.real) if order is None else order
    name = torch.empty_like(order)
    name[order] = torch.arange(len(order))
    head = problem.teacher.head
    weight = torch.cat([head.weight[: problem.real][order], head.weight[problem.real :]])
    bias = head.bias
    bias = bias if bias is None else torch.cat([bias[: problem.real][order], bias[problem.real :]])
    return AlignedTeacherOutputs(
        problem.teacher.hidden,
        replace(head, weight=weight, bias=bias),
        name[problem.labels],
        np.arange(count),
        np.arange(count),
        identity(problem.real),
        TokenClasses.of(order, name),
    )


@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
@pytest.mark.parametrize("permuted", [False, True], ids=["same ids", "other ids"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_vocabularies_give_the_ordinary_loss(divergence, permuted, dtype):
    problem = Problem(bias=True, softcap=5.0).to(dtype)
    objective = Objective(0.7, divergence, 2.0, True)
    order = torch.randperm(problem.real, generator=torch.Generator().manual_seed(1))
    outputs = one_to_one(problem, order if permuted else None)
    wanted, sums = problem.fused(objective)
    problem.teacher = outputs
    found, ours = problem.fused(objective)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours, sums, rtol=tolerance, atol=0)
    gradients = [torch.autograd.grad(loss, problem.trained) for loss in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert distance(one, other) < tolerance


class TensorSizeLimit(TorchDispatchMode):
    """Fails if a tensor of more than `most` elements is created."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.largest = most, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
            assert result.numel() <= self.most, (function, result.shape)
        return result


class TwoVocabularies(Problem):
    """A random problem: different ids and numbers of tokens, and segments of every kind."""

    def __init__(
        self, segments: int = 60, theirs: int = 71, real: int = 53, common: int = 20, **kw
    ):
        super().__init__(tokens=1, real=real, **kw)
        generator = torch.Generator().manual_seed(self.seed + 1)
        draw = lambda *size, high: torch.randint(0, high, size, generator=generator)  # noqa: E731
        sides = []
        for size in (real, theirs):
            main = torch.randperm(size, generator=generator)[:common]
            class_of = draw(
                size, high=common - 3
            )  # so that some classes have only their main token
            class_of[main] = torch.arange(common)
            sides.append(TokenClasses.of(class_of, main))
        ours, others = [], []
        names, other_names = [], []
        for segment in range(segments):
            if segment % 5 == 4:  # a target in no segment
                ours.append(draw(1, high=real))
                names.append(-1)
            kind = segment % 6
            n, m = ((1, 1), (1, 1), (2, 1), (1, 3), (3, 2), (4, 4))[kind]
            a, b = draw(n, high=real), draw(m, high=theirs)
            same = int(draw(1, high=common))
            if kind == 0 or segment % 7 == 3:  # the first tokens are a pair
                a[0], b[0] = sides[0].main[same], sides[1].main[same]
            ours.append(a)
            others.append(b)
            names += [segment] * n
            other_names += [segment] * m
        self.labels, labels = torch.cat(ours), torch.cat(others)
        self.tokens = len(self.labels)
        normal = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
        self.hidden = (self.magnitude * normal(self.tokens, self.width)).requires_grad_()
        weight = normal(theirs + self.teacher_padding, self.teacher_width)
        bias = normal(len(weight)) if self.bias else None
        self.teacher = AlignedTeacherOutputs(
            self.magnitude * normal(len(labels), self.teacher_width),
            Head(weight, bias, self.scale, self.softcap),
            labels,
            np.array(names),
            np.array(other_names),
            *sides,
        )

    def to_float32(self) -> "TwoVocabularies":
        self.hidden = self.hidden.detach().float().requires_grad_()
        self.head, self.teacher.head = (
            self.head.to(torch.float32),
            self.teacher.head.to(torch.float32),
        )
        self.head = replace(self.head, weight=self.head.weight.detach().requires_grad_())
        self.teacher.hidden = self.teacher.hidden.float()
        return self

    def expected(self, objective: Objective) -> tuple[Tensor, float]:
        outputs = self.teacher
        student = whole_logits(self.hidden, self.head)[:, : self.real]
        teacher = whole_logits(outputs.hidden, outputs.head)[:, : outputs.vocab_size]
        return segment_by_segment(student, self.labels, teacher, outputs, objective)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
def test_loss_and_gradient_equal_those_of_autograd_in_float64(divergence, temperature, seed):
    problem = TwoVocabularies(seed=seed, bias=True, softcap=6.0)
    objective = Objective(0.6, divergence, temperature, True)
    with (
        patch.object(elementwise, "BLOCK_ELEMENTS", 7 * 71),
        patch.object(fused, "tile_tokens", lambda *_: 33),
    ):
        found, sums = problem.fused(objective)
    wanted, soft = problem.expected(objective)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert metrics_by_name(sums)["divergence"] == pytest.approx(soft, rel=1e-9)
    assert metrics_by_name(sums)["tokens"] == problem.tokens
    gradients = [torch.autograd.grad(loss, problem.trained) for loss in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert distance(one, other) < 1e-8


def test_no_tensor_is_larger_than_a_tile_of_the_larger_vocabulary():
    problem, tile = TwoVocabularies(segments=200), 100
    assert problem.tokens * problem.real > 3 * tile * 71
    most = tile * padded_width(71)
    with patch.object(fused, "tile_tokens", lambda *_: tile), TensorSizeLimit(most) as seen:
        loss, _ = problem.fused(Objective(0.5))
        loss.backward()
    assert seen.largest == most  # the teacher's logits; the hidden states are smaller


def test_tiles_hold_whole_segments_and_every_target_once():
    outputs = TwoVocabularies(segments=200).teacher
    for most in (32, 50, 1000):
        tiles = list(outputs.tiles(most))
        for side, segments in ((0, outputs.segments), (1, outputs.teacher_segments)):
            rows = [i for tile in tiles for i in range(tile[side].start, tile[side].stop)]
            assert rows == list(range(len(segments)))
            assert max(tile[side].stop - tile[side].start for tile in tiles) <= most
        for ours, theirs in tiles:
            numbers = outputs.segments[ours]
            assert set(numbers[numbers >= 0]) == set(outputs.teacher_segments[theirs])


@pytest.mark.parametrize("magnitude", [30.0, 300.0])
@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
def test_loss_and_gradient_are_finite_for_very_confident_models(divergence, magnitude):
    problem = TwoVocabularies(magnitude=magnitude).to_float32()
    loss, _ = problem.fused(Objective(0.5, divergence))
    gradients = torch.autograd.grad(loss, problem.trained)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_a_nan_of_either_model_reaches_the_loss():
    for side in ("student", "teacher"):
        problem = TwoVocabularies()
        broken = problem.hidden if side == "student" else problem.teacher.hidden
        broken.detach()[-1, 0] = torch.nan
        for name in DIVERGENCES:
            loss, sums = problem.fused(Objective(1.0, name))
            assert loss.isnan() and sums[TOKEN_METRICS.index("divergence")].isnan()
