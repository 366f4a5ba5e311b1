"""Compile Triton kernels for GPUs that need not be here, and read the code that results."""

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
    ptx: str

    @property
    def loops(self) -> list[str]:
        """The PTX of every innermost loop: from a label to a branch back to it."""
        lines = self.ptx.splitlines()
        labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line[:3] == "$L_"}
        branches = [re.search(r"\sbra(?:\.uni)?\s+(\$L_\w+);", line) for line in lines]
        found = [(labels[b[1]], i) for i, b in enumerate(branches) if b and labels[b[1]] < i]
        inner = [
            (start, end)
            for start, end in found
            if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in found)
        ]
        return ["\n".join(lines[start:end]) for start, end in inner]


def widths(kind: str, ptx: str) -> list[int]:
    """The bytes that a thread loads ("ld") or stores ("st") at once, each number once."""
    found = re.findall(rf"{kind}\.global[\w:]*((?:\.v\d)?)\.[bfus](\d+)", ptx)
    return sorted({int(vector[2:] or 1) * int(bits) // 8 for vector, bits in found})


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
    if torch.cuda.is_available():
        driver.reset_active()  # without a GPU there is none
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return GpuCode(int(registers), int(stack) + int(local), binary.asm["ptx"])
