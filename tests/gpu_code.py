"""Compile Triton kernels for GPUs that need not be here, and read what the compiler made of them.

Import this only in a process of its own: it replaces Triton's driver.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor


@dataclass(frozen=True)
class GpuCode:
    """What a kernel became for one GPU."""

    registers: int  # per thread
    spilled: int  # bytes per thread
    loops: list[str]  # PTX of every innermost loop

    def in_loops(self, pattern: str) -> list[str]:
        return [found for loop in self.loops for found in re.findall(pattern, loop)]

    @property
    def widths(self) -> dict[str, set[int]]:
        """The bytes that a thread loads and stores at once inside loops."""
        return {
            kind: {
                int(vector[2:] or 1) * int(bits) // 8
                for vector, bits in self.in_loops(rf"{kind}\.global[\w:]*((?:\.v\d)?)\.[bfus](\d+)")
            }
            for kind in ("ld", "st")
        }


class Launches:
    """Stands for a kernel and records the arguments of its launches, as Triton would get them."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict[str, Any]]] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((args, options))


class AbsentGpu:
    """A Triton driver that names a GPU and cannot run anything."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def gpu_code(kernel: JITFunction, launch: tuple[tuple, dict], capability: int) -> GpuCode:
    """Compile `kernel` for the arguments of a launch, which may be tensors on the meta device."""
    args, options = launch
    driver.set_active(AbsentGpu(capability))
    mocks = [MockTensor(x.dtype, [*x.shape]) if isinstance(x, torch.Tensor) else x for x in args]
    binary = kernel.warmup(*mocks, grid=(1,), **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return GpuCode(int(registers), int(stack) + int(local), innermost_loops(binary.asm["ptx"]))


def innermost_loops(ptx: str) -> list[str]:
    """The text between a label and a branch back to it, if it holds no other loop."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if line[:3] == "$L_"}
    found = []
    for i, line in enumerate(lines):
        branch = re.search(r"\sbra(?:\.uni)?\s+(\$L_\w+);", line)
        if branch and labels[branch[1]] < i:
            found.append((labels[branch[1]], i))
    return [
        "\n".join(lines[a:b])
        for a, b in found
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in found)
    ]
