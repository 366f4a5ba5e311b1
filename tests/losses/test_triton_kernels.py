"""The Triton kernel: interpreted on any machine with Triton, and compiled on a GPU."""

import importlib.util
import json
import sys

import pytest
import torch
from oracle import Problem, distance
from processes import start

from kd.losses.divergences import DIVERGENCES
from kd.settings.distillation import Objective

HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_interpreted_kernel_gives_the_metrics_and_gradients_of_elementwise():
    """Runs in its own process, because Triton reads the variable when it is imported."""
    done = start(sys.executable, "tests/jobs/triton_interpreted.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    from kd.losses.triton_kernels import KERNEL_DIVERGENCES

    assert set(KERNEL_DIVERGENCES) <= set(DIVERGENCES) and len(KERNEL_DIVERGENCES) >= 7
    assert len(found) == 16 * len(KERNEL_DIVERGENCES) + 2
    assert {key: value for key, value in found.items() if not value < 2e-5} == {}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernel_compiled_for_three_generations_of_gpus_loads_whole_vectors_and_spills_nothing():
    """No step of a pass exchanges values between threads. Only biases are read one by one."""
    done = start(sys.executable, "tests/jobs/triton_compiled.py", PYTHONPATH="tests:.")
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3 * 18
    for variant, code in found.items():
        assert code["loops"] >= 2 and code["spilled"] == 0 == code["exchanges"], variant
        assert code["registers"] <= 128, variant  # two programs at once on a multiprocessor
        assert code["load"] == ([2, 16] if "real" in variant else [16]), variant
        assert code["store"] == ([] if "training" in variant else [8]), variant


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("real, padding", [(4981, 8), (4981, 139)])  # odd, aligned heads or not
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_loss_and_gradients_on_a_gpu_equal_float64(
    divergence, real, padding, temperature, dtype, tolerance
):
    """Each row has several blocks. Half-precision products round the logits' gradient once."""
    widths = {"width": 64, "teacher_width": 96, "student_padding": padding}
    problem = Problem(tokens=200, real=real, bias=True, softcap=30.0, **widths)
    problem = problem.to(dtype, "cuda")
    objective = Objective(0.5, divergence, temperature)
    loss, _ = problem.fused(objective)
    exact = problem.to(torch.float64)
    truth, _ = exact.expected(objective)
    assert distance(loss.cpu(), truth) < 1e-4
    found = torch.autograd.grad(loss, problem.trained)
    expected = torch.autograd.grad(truth, exact.trained)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and distance(one.cpu(), other) < tolerance
