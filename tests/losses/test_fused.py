"""The fused loss equals float64 autograd on whole logits, for any tiles, dtypes and padding."""

import contextlib
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Problem, distance, metrics_by_name
from torch.utils._python_dispatch import TorchDispatchMode

from kd.losses import elementwise, fused
from kd.losses.divergences import DIVERGENCES
from kd.losses.fused import TILE, linear_distillation_loss, tile_tokens
from kd.losses.head import Head
from kd.losses.metrics import TOKEN_METRICS
from kd.settings.distillation import Objective

OBJECTIVES = st.builds(
    Objective,
    soft_weight=st.sampled_from([0.0, 0.3, 1.0]),
    divergence=st.sampled_from(list(DIVERGENCES)),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    temperature_squared=st.booleans(),
    jensen_shannon_weight=st.sampled_from([0.1, 0.5, 0.9]),
    skew=st.sampled_from([0.1, 0.7]),
)
PROBLEMS = st.builds(
    Problem,
    tokens=st.sampled_from([1, 2, 7, 19]),
    student_padding=st.sampled_from([0, 3, 20, 90]),  # 53 + 90 rows: more than are multiplied
    teacher_padding=st.sampled_from([0, 3, 20, 90]),
    trained_head=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.5]),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    magnitude=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 10_000),
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 3e-5)])
@given(problem=PROBLEMS, objective=OBJECTIVES)
@settings(deadline=None, max_examples=300)
def test_loss_metrics_and_gradients_equal_float64_autograd(dtype, tolerance, problem, objective):
    # float32 rounds logits in the hundreds to 1e-5, and so every probability.
    assume(dtype == torch.float64 or problem.magnitude <= 1.0)
    problem = problem.to(dtype)
    sizes = {"BLOCK_ELEMENTS": 200, "STRETCH": 8}
    with patch.object(fused, "TILE", 7), patch.multiple(elementwise, **sizes):
        loss, sums = problem.fused(objective)  # 3 rows per block: neither divides the tokens
    exact = problem.to(torch.float64)
    truth, expected_metrics = exact.expected(objective)
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance, abs=tolerance)
    for name, found in metrics_by_name(sums).items():
        if name == "top1_agreement" and dtype == torch.float32:
            continue  # saturated logits tie in float32, and either argmax is right
        assert found == pytest.approx(expected_metrics[name], rel=tolerance, abs=tolerance), name
    scale = 3.0  # as a loss scale does
    found = torch.autograd.grad(loss * scale, problem.trained)
    expected = torch.autograd.grad(truth * scale, exact.trained)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        # Where a gradient cancels, the rounding error of its terms, the logits, remains.
        assert (one - other).norm() < tolerance * (other.norm() + max(1.0, problem.magnitude))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extreme_logits_give_the_loss_of_float64(divergence, temperature):
    """With logits near 10 000, almost all probabilities are 0 in float32."""
    problem = Problem(magnitude=2000.0, trained_head=False).to(torch.float32)
    objective = Objective(0.5, divergence, temperature)
    loss, sums = problem.fused(objective)
    exact = problem.to(torch.float64)
    truth, _ = exact.expected(objective)
    assert sums.isfinite().all() and distance(loss, truth) < 1e-5
    (found,), (expected,) = (
        torch.autograd.grad(x, p.hidden) for x, p in ((loss, problem), (truth, exact))
    )
    assert distance(found, expected) < 1e-3  # float32 rounds such logits to 1e-3


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name[:4] != "soft"])
def test_a_student_equal_to_its_teacher_has_zero_divergence_and_zero_gradient(divergence):
    problem = Problem(width=20, student_padding=16, trained_head=False).to(torch.float32)
    problem.head = Head(problem.teacher.head.weight, None, problem.head.scale)
    problem.hidden = problem.teacher.hidden.clone().requires_grad_()
    loss, _ = problem.fused(Objective(1.0, divergence))
    (gradient,) = torch.autograd.grad(loss, problem.hidden)
    assert abs(loss.item()) < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("block", [1, 200, 10**6])
def test_tile_and_block_sizes_do_not_change_gradients(tile, block):
    """Within 1e-6 relative in float32, for every trained tensor."""
    problem, objective = Problem(bias=True).to(torch.float32), Objective(0.5, temperature=2.0)
    whole, _ = problem.fused(objective)
    expected = torch.autograd.grad(whole, problem.trained)
    with patch.object(fused, "TILE", tile), patch.object(elementwise, "BLOCK_ELEMENTS", block):
        tiled, _ = problem.fused(objective)
    found = torch.autograd.grad(tiled, problem.trained)
    assert distance(tiled, whole) < 1e-6
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-6


def test_sft_is_cross_entropy_only_and_needs_no_teacher():
    problem = Problem()
    loss, sums = problem.fused(Objective(soft_weight=0.0), with_teacher=False)
    truth, expected = problem.expected(Objective(soft_weight=0.0))
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    found = metrics_by_name(sums)
    assert found["divergence"] == found["teacher_cross_entropy"] == found["top1_agreement"] == 0.0
    assert found["student_entropy"] == pytest.approx(expected["student_entropy"])


@pytest.mark.parametrize("with_teacher", [True, False])
def test_without_target_tokens_the_loss_is_zero_and_differentiable(with_teacher):
    problem = Problem(tokens=0, bias=True)
    loss, sums = problem.fused(Objective(0.5 if with_teacher else 0.0), with_teacher)
    loss.backward()
    assert loss.item() == 0.0 and sums.sum() == 0.0
    assert problem.hidden.grad.shape == (0, problem.width)
    assert not problem.head.weight.grad.any() and not problem.head.bias.grad.any()


class Products(TorchDispatchMode):
    """Record the shapes of the matrix products that run inside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "matmul", "linear", "baddbmm"):
            self.shapes.append(tuple(result.shape))
        # Row-wise inner products over V are not matrix products.
        assert name != "bmm" or result.shape[1:] == (1, 1)
        return result


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("soft_weight", [0.5, 1.0])
def test_a_tile_costs_three_products_with_a_frozen_head_and_four_with_a_trained_one(
    divergence, soft_weight
):
    objective = Objective(soft_weight, divergence, temperature=2.0)
    n, width = fused.TILE, 12
    # The heads have fewer rows than an aligned number of ids, so all rows are multiplied.
    three = [(n, 53 + 8), (n, 53 + 16), (n, width)]
    for trained_head, expected in ((False, three), (True, [*three, (53 + 8, width)])):
        problem = Problem(tokens=2 * n, trained_head=trained_head).to(torch.float32)
        with Products() as products:
            loss, _ = problem.fused(objective)
            loss.backward()
        assert products.shapes == 2 * expected


def test_no_gradient_is_computed_under_no_grad_or_if_nothing_is_trained():
    problem = Problem(tokens=128).to(torch.float32)
    frozen = problem.to(torch.float32)
    frozen.hidden.requires_grad_(False)
    frozen.head = Head(frozen.head.weight.detach(), None, frozen.head.scale)
    with Products() as products:
        with torch.no_grad():
            problem.fused(Objective(0.5))
        frozen.fused(Objective(0.5))
    assert products.shapes == 2 * [
        (128, len(x.weight)) for x in (problem.head, problem.teacher.head)
    ]


def test_float32_heads_are_read_in_place():
    """On a CPU in float32, no head or slice of one is copied."""
    problem = Problem(tokens=4, real=1000, student_padding=5, trained_head=False).to(torch.float32)

    class NoHeadCopies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[:1] >= (problem.real,):
                heads = (problem.head.weight, problem.teacher.head.weight)
                assert any(result.data_ptr() == head.data_ptr() for head in heads), function
            return result

    with NoHeadCopies():
        problem.fused(Objective(0.5))[0].backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece_bytes", [1000, 2**25])
def test_half_precision_heads_are_multiplied_in_float32(dtype, piece_bytes):
    problem = Problem(bias=True).to(dtype)
    exact = problem.to(torch.float64)
    objective = Objective(0.5, temperature=2.0)
    with patch.object(fused, "PIECE_BYTES", piece_bytes):
        loss, _ = problem.fused(objective)
    truth, _ = exact.expected(objective)
    assert loss.dtype == torch.float32 and distance(loss, truth) < 1e-6
    found = torch.autograd.grad(loss, problem.trained)
    expected = torch.autograd.grad(truth, exact.trained)
    for one, other in zip(found, expected, strict=True):
        # As if the float64 gradient were rounded once to the parameter's dtype.
        assert one.dtype == dtype and distance(one, other) < torch.finfo(dtype).eps


@contextlib.contextmanager
def cuda_products(dtype: torch.dtype):
    """Emulate the buffers of CUDA on a CPU: half-precision products with float32 output."""

    def multiply(a, b, out, accumulate=False, factor=1.0):
        assert a.dtype == b.dtype == dtype and out.dtype == torch.float32
        product = factor * (a.float() @ b.float())
        out.copy_(out + product if accumulate else product)

    with (
        patch.object(fused, "_product_dtype", lambda *_: dtype),
        patch.object(fused, "_multiply", multiply),
    ):
        yield


def float16_errors(problem: Problem, objective: Objective) -> list[float]:
    """Return the error of every gradient with float16 products, relative to float64."""
    problem = problem.to(torch.float16)
    exact = problem.to(torch.float64)
    truth, _ = exact.expected(objective)
    with cuda_products(torch.float16):
        loss, _ = problem.fused(objective)
    # The gradient as it is kept, before the loss scale.
    expected = torch.autograd.grad(truth, exact.trained)
    found = [x for x in loss.grad_fn.gradients if x is not None]
    pairs = zip(found, expected, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_float16_gradients_of_the_logits_do_not_underflow(divergence, temperature):
    """Nearly all of the 20 000 probabilities are below the smallest number of float16."""
    for soft_weight in (1.0, 0.5):
        problem = Problem(4, 20_000, magnitude=0.5, bias=True)
        errors = float16_errors(problem, Objective(soft_weight, divergence, temperature))
        assert max(errors) < 1e-3, errors


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_float16_gradients_of_an_almost_converged_student_do_not_underflow(temperature):
    problem = Problem(4, 20_000, student_padding=16, width=20, magnitude=0.5)
    weight = problem.teacher.head.weight
    problem.head = Head(weight.clone().requires_grad_(), None, problem.head.scale)
    problem.hidden = (problem.teacher.hidden * 1.01).detach().requires_grad_()
    for divergence in ("forward_kl", "reverse_kl"):
        errors = float16_errors(problem, Objective(1.0, divergence, temperature))
        assert max(errors) < 1e-3, errors


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_large_float16_gradients_do_not_overflow(divergence):
    """The gradient of reverse KL grows with the logits, here to more than 10 000."""
    problem = Problem(30, magnitude=300.0, scale=4.0)
    objective = Objective(1.0, divergence, 4.0, temperature_squared=True)
    assert max(float16_errors(problem, objective)) < 2e-3


def test_half_precision_products_round_only_the_logits_gradient_and_no_sum():
    problem = Problem(bias=True).to(torch.bfloat16)
    exact = problem.to(torch.float64)
    with cuda_products(torch.bfloat16):
        loss, _ = problem.fused(Objective(0.5))
    truth, _ = exact.expected(Objective(0.5))
    assert distance(loss, truth) < 1e-6
    found = torch.autograd.grad(loss, problem.trained)
    expected = torch.autograd.grad(truth, exact.trained)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 2**-8  # bfloat16 has 8 bits of precision


def test_half_precision_gradients_survive_a_loss_scale_of_65536():
    """The stored gradient is float32 and scaled before the cast, so fp16 does not underflow."""
    problem = Problem(tokens=64, trained_head=False).to(torch.float16)
    tiny, scale = 1e-7, 2.0**16
    loss, _ = problem.fused(Objective(1.0))
    (scaled,) = torch.autograd.grad(loss * tiny * scale, problem.hidden)
    exact = problem.to(torch.float64)
    truth, _ = exact.expected(Objective(1.0))
    (expected,) = torch.autograd.grad(truth * tiny * scale, exact.hidden)
    torch.testing.assert_close(scaled.double(), expected, rtol=2e-3, atol=1e-6)


def test_backward_can_run_twice_on_the_same_loss():
    problem = Problem()
    loss, _ = problem.fused(Objective(0.5))
    first = torch.autograd.grad(loss, problem.trained, retain_graph=True)
    second = torch.autograd.grad(loss, problem.trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_temperature_squared_multiplies_loss_and_gradient_alike():
    problem = Problem(trained_head=False)
    plain, _ = problem.fused(Objective(1.0, temperature=3.0))
    squared, _ = problem.fused(Objective(1.0, temperature=3.0, temperature_squared=True))
    torch.testing.assert_close(squared, 9 * plain, rtol=1e-12, atol=0)
    (a,), (b,) = (torch.autograd.grad(loss, problem.hidden) for loss in (plain, squared))
    torch.testing.assert_close(b, 9 * a, rtol=1e-12, atol=0)


@pytest.mark.parametrize("student_padding, teacher_padding", [(8, 136), (136, 8), (0, 128)])
def test_padded_ids_of_either_head_get_no_probability(student_padding, teacher_padding):
    """Raising the logits of padded ids changes nothing, whichever head has more rows."""
    problem = Problem(
        student_padding=student_padding, teacher_padding=teacher_padding, trained_head=False
    )
    loss, sums = problem.fused(Objective(0.5))
    problem.head.weight[problem.real :] += 100.0
    problem.teacher.head.weight[problem.real :] += 100.0
    again, same = problem.fused(Objective(0.5))
    assert torch.equal(loss, again) and torch.equal(sums, same)


def test_padded_rows_of_a_trained_head_get_no_gradient():
    problem = Problem(student_padding=8)
    problem.fused(Objective(0.5))[0].backward()
    assert not problem.head.weight.grad[problem.real :].any()
    assert problem.head.weight.grad[: problem.real].abs().sum(-1).all()


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_head_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(owner):
    problem = Problem(**{f"{owner}_padding": -1})
    with pytest.raises(ValueError, match=f"{owner}'s head has 52 rows and the tokenizer 53 ids"):
        problem.fused(Objective(0.5))


def test_teacher_outputs_of_another_batch_are_refused():
    problem = Problem(tokens=6)
    problem.teacher = replace(problem.teacher, hidden=problem.teacher.hidden[:5])
    with pytest.raises(ValueError, match="cover 5 tokens and the batch has 6 targets"):
        problem.fused(Objective(0.5))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_either_model_makes_the_loss_nan(side):
    problem = Problem(tokens=3)
    broken = problem.hidden if side == "student" else problem.teacher.hidden
    broken.detach()[1, 0] = torch.nan
    for name in DIVERGENCES:
        loss, sums = problem.fused(Objective(1.0, name))
        assert loss.isnan() and sums[TOKEN_METRICS.index("divergence")].isnan()


@pytest.mark.parametrize("width", [7, 1024, 1536, 2000])
def test_argmax_returns_the_first_of_equal_maxima(width):
    logits = torch.randint(50, (64, width), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = 1.0  # all equal
    logits[1, -1] = 99.0  # after the last whole stretch
    logits[2, width // 2] = torch.nan
    assert torch.equal(elementwise.argmax(logits), logits.argmax(-1, keepdim=True))


def test_log_probabilities_from_one_softmax_equal_log_softmax():
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(0)) * 30
    log_p, p = torch.empty(2, 8, 3000)
    elementwise.probabilities(logits, log_p, p)
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(log_p.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.allclose(p.double(), expected.exp(), rtol=1e-5, atol=1e-9)


def test_the_tile_size_fits_the_workspace():
    """Buffers and temporaries fit into 512 MiB with the vocabulary of Qwen 2.5 on a GPU."""
    gpu, full, half = torch.device("cuda"), torch.float32, torch.bfloat16
    vocab_size = 152_064
    found = tile_tokens(Objective(soft_weight=0.0), vocab_size, full, [half, half], gpu)
    assert found == 256 and found * vocab_size * (4 + 4 + 2) < 512 * 2**20
    cpu = torch.device("cpu")
    found = tile_tokens(Objective(soft_weight=0.0), vocab_size, full, [full, full], cpu)
    assert found == 371 < TILE and found * vocab_size * (4 + 4) < 512 * 2**20
    assert tile_tokens(Objective(soft_weight=0.0), 32_000, full, [full, full], cpu) == TILE
    small = Objective(soft_weight=0.0, loss_workspace_mb=128)
    assert 1 <= tile_tokens(small, vocab_size, full, [half, half], gpu) < 64


def test_loss_takes_labels_of_the_last_real_id():
    problem = Problem(tokens=2)
    problem.labels = torch.tensor([0, problem.real - 1])
    found, _ = linear_distillation_loss(
        problem.hidden, problem.labels, problem.head, Objective(soft_weight=0.0), problem.real
    )
    torch.testing.assert_close(
        found, problem.expected(Objective(soft_weight=0.0))[0], rtol=1e-12, atol=0
    )
