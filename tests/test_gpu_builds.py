"""The build of torch for a driver, GPUs that torch cannot use, and a Triton that cannot compile."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from one_run import flags
from processes import start

from kd import gpu
from kd.gpu import Gpu, has_kernels, torch_index, why_unusable
from kd.losses import elementwise, fused
from kd.models import awq, awq_writer
from kd.recipe import as_flags
from kd.settings.distillation import Objective
from kd.settings.training_recipe import parse_distillation
from kd.training.settle import settle

T4 = Gpu("Tesla T4", "535.183.01", (7, 5))


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with these GPUs on PATH."""

    def install(*rows: str) -> str:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
        program.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", path)
        return path

    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.mark.parametrize(
    "rows, build",
    [
        (["NVIDIA H100 80GB HBM3, 580.159.04, 9.0"], "cu130"),
        (["Tesla T4, 535.183.01, 7.5", "Tesla T4, 535.183.01, 7.5"], "cu126"),
        (["Tesla V100-SXM2-16GB, 580.95.05, 7.0"], "cu126"),  # CUDA 13 begins with Turing
        (["NVIDIA B200, 570.124.06, 10.0"], "cu128"),  # cu126 ends with Hopper
        (["NVIDIA GeForce RTX 5090, 595.10, 12.0"], "cu130"),
    ],
)
def test_the_build_of_torch_suits_driver_and_gpu(driver, rows, build):
    driver(*rows)
    assert torch_index() == f"https://download.pytorch.org/whl/{build}"


def test_the_user_may_name_an_index_and_hide_the_gpu(driver, monkeypatch):
    driver("Tesla T4, 535.183.01, 7.5")
    monkeypatch.setenv("TORCH_INDEX", "https://mirror/whl/cu126")
    assert torch_index() == "https://mirror/whl/cu126"
    monkeypatch.delenv("TORCH_INDEX")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert torch_index() is None


def test_a_driver_that_is_too_old_for_every_build_is_named(driver):
    driver("Tesla T4, 470.57.02, 7.5")
    with pytest.raises(ValueError, match=r"Tesla T4, driver 470.57.02.*525.60.13.*TORCH_INDEX"):
        torch_index()


@pytest.mark.parametrize(
    "cuda, available, architectures, reason",
    [
        (None, False, [], "without CUDA"),
        ("13.0", False, [], "CUDA 13.0 needs driver 580.65.6 or newer"),
        ("12.6", False, [], "CUDA does not start"),
        ("12.6", True, ["sm_80", "sm_90a"], "not for compute capability 7.5"),
        ("12.6", True, ["sm_75", "sm_80"], None),
    ],
)
def test_the_reason_why_torch_cannot_use_a_gpu(cuda, available, architectures, reason):
    found = why_unusable([T4], cuda, available, architectures)
    assert found is None if reason is None else reason in found


def test_code_runs_within_a_major_version_and_ptx_on_everything_newer():
    """Binary compatibility as in NVIDIA's programming guide."""
    build = ["sm_75", "sm_80", "sm_90a", "compute_120"]
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0), (13, 0)]:
        assert has_kernels(capability, build), capability
    for capability in [(7, 0), (10, 0)]:
        assert not has_kernels(capability, build), capability


@pytest.mark.gpu
def test_torch_and_triton_can_use_the_gpu_of_this_machine():
    assert gpu.listed_gpus()
    gpu.check_gpus()
    assert gpu.triton_compiles()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_stops_before_loading_if_torch_cannot_use_the_gpu(
    driver, models, tmp_path, monkeypatch
):
    path = driver("Tesla T4, 535.183.01, 7.5", "Tesla T4, 535.183.01, 7.5")
    given = flags(models, tmp_path / "run")
    done = start(sys.executable, "train/distill.py", *given, PATH=path)
    told = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(told) == 1 and "Traceback" not in done.stdout
    assert "found 2 GPUs (Tesla T4, driver 535.183.01), which torch" in told[0]
    assert "use_cpu: true" in told[0] and not (tmp_path / "run/run.json").exists()
    recipe = parse_distillation(argv=[*given, *as_flags({"use_cpu": True})])
    assert settle(recipe).training.use_cpu  # no error
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=-1"):  # evaluation and generation
        gpu.device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu.device() == "cpu"


def test_without_compiler_or_headers_triton_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    assert gpu.why_no_c_module() is None  # DeepSpeed needs the compiler, too
    with monkeypatch.context() as patch:
        patch.setattr(gpu.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        assert "Triton needs Python.h" in gpu.why_no_c_module()
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu.triton_compiles.cache_clear()
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    try:
        assert not gpu.triton_compiles()
        assert "note: Triton needs a C compiler" in capsys.readouterr().out
        on_gpu = SimpleNamespace(is_cuda=True)
        chosen = fused._elementwise_pass(on_gpu, torch.float32, Objective(1.0))
        assert chosen is elementwise.tile_metrics
    finally:
        gpu.triton_compiles.cache_clear()


def test_awq_layers_have_the_same_weight_without_triton(monkeypatch):
    """The tensor says that it is on a GPU, so the kernel would run, and fail here."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    packed = awq_writer.quantize(torch.randn(16, 128), 128)
    expected = awq.dequantize(*packed, torch.float32)
    monkeypatch.setattr(awq, "triton_compiles", lambda: False)
    weight = awq.dequantize(packed[0].as_subclass(OnGpu), *packed[1:], torch.float32)
    assert torch.equal(weight.as_subclass(torch.Tensor), expected)
