"""The kernels of packed weights: interpreted, compiled without a GPU, and on a GPU."""

import importlib.util
import json
import re
import subprocess
import sys

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


def kernel_sources() -> dict:
    """Both kernels with their largest blocks, as a call with int32 sizes specialises them."""
    from triton.compiler import ASTSource

    from kd.models import packed_kernels as k

    tensors = {"qweight": "*i32", "qzeros": "*i32", "scales": "*fp16", "weight": "*fp16"}
    awq_blocks = {"ROWS": k.AWQ_ROWS, "WORDS": k.AWQ_WORDS}
    gptq_blocks = {"MINUS_ONE": True, "ROWS": k.GPTQ_ROWS, "WORDS": k.GPTQ_WORDS}
    cases = {
        "awq": (k.awq_kernel, tensors | {"words": "i32", "group": "i32"}, awq_blocks),
        "gptq": (
            k.gptq_kernel,
            tensors | {"g_idx": "*i32", "inputs": "i32", "words": "i32"},
            gptq_blocks,
        ),
    }
    sources = {}
    for name, (kernel, types, blocks) in cases.items():
        ordered = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(ordered.values())
            if kind != "constexpr"
        }
        sources[name] = ASTSource(kernel, ordered, blocks, aligned)
    return sources


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_the_kernels_compile_without_spilled_registers(name, capability, tmp_path):
    """Ahead of time: no GPU is asked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    compiled = triton.compile(
        kernel_sources()[name],
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4},
    )
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = f"{compiler.__file__.rpartition('/')[0]}/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", str(tmp_path / "kernel.cubin")], capture_output=True, text=True
    )
    found = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage.stdout)}
    assert found["STACK"] == found["LOCAL"] == 0, usage.stdout
    assert "st.global.v4" in compiled.asm["ptx"] or "st.global.v2" in compiled.asm["ptx"]


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
