"""The kernels of packed weights: interpreted, compiled without a GPU, and on a GPU."""

import importlib.util
import json
import sys
from unittest.mock import patch

import pytest
import torch
from jobs.packed_interpreted import awq_tensors, gptq_tensors
from processes import succeed

from kd.models import awq, gptq

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@needs_triton
def test_the_interpreted_kernels_agree_with_torch():
    """Runs in a new process, because Triton reads TRITON_INTERPRET when it is imported."""
    output = succeed(sys.executable, "tests/jobs/packed_interpreted.py", TRITON_INTERPRET="1")
    found = json.loads(output.splitlines()[-1])
    assert len(found) == 2 * (4 + 4 * 2 * 2) and set(found.values()) == {0.0}


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_kernels_compiled_without_a_gpu_store_whole_vectors_and_spill_nothing(name, capability):
    from gpu_code import Launches, gpu_code, widths

    from kd.models import packed_kernels

    tensors = {"awq": awq_tensors(256, 512, 128), "gptq": gptq_tensors(256, 512, 128, True)}[name]
    tensors = [tensor.to("meta") for tensor in tensors]
    options = {"awq": (), "gptq": (True,)}[name]
    kernel = getattr(packed_kernels, f"{name}_kernel")
    with patch.object(packed_kernels, f"{name}_kernel", Launches()) as launches:
        getattr(packed_kernels, f"dequantize_{name}")(*tensors, *options, torch.float16)
    code = gpu_code(kernel, launches.calls[0], capability)
    assert code.spilled == 0 and min(widths("st", code.ptx)) >= 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs, out, group", [(5120, 27648, 128), (96, 536, 48), (21, 8, 7)])
def test_the_awq_kernel_agrees_with_torch_on_a_gpu(inputs, out, group, dtype):
    torch.manual_seed(0)
    packed = awq_tensors(inputs, out, group)
    found = awq.dequantize(*(tensor.cuda() for tensor in packed), dtype)
    assert torch.equal(found.cpu(), awq.dequantize(*packed, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs, out, group", [(5120, 27648, 128), (88, 152, 16), (72, 24, 32)])
def test_the_gptq_kernel_agrees_with_torch_on_a_gpu(inputs, out, group, act_order, dtype):
    torch.manual_seed(0)
    packed = gptq_tensors(inputs, out, group, act_order)
    found = gptq.dequantize(*(tensor.cuda() for tensor in packed), True, dtype)
    assert torch.equal(found.cpu(), gptq.dequantize(*packed, True, dtype))
