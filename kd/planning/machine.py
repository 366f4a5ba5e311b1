"""The machine of a run: its processes, device, memory per process, and machine file."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available

from kd.distributed import all_gather, world_size
from kd.models.attention import gpu_runs_flash_attention
from kd.planning.layout import GIB
from kd.recipe import AUTO, NONE
from kd.settings.machine_file import MachineFile, machine_file_for, read_machine_file
from kd.settings.training import TrainingSettings, set_by_accelerate


@dataclass(frozen=True)
class Machine:
    """The part of a run that the machine decides."""

    processes: int
    device: str  # cuda or cpu
    memory: float  # bytes that a process may use on its device
    zero: dict | None = None  # the DeepSpeed engine of accelerate's configuration
    per_machine: int | None = None  # processes per machine; None: all of them
    bfloat16: bool = False  # whether the device computes in bfloat16
    flash_attention: bool = False  # whether flash-attn is installed and the device can run it
    file: MachineFile = MachineFile()

    @property
    def repeats_keys(self) -> bool:
        """Whether it is a GPU older than Ampere; these also lack bfloat16 (kd.models.attention)."""
        return self.device == "cuda" and not self.bfloat16


def present_machine(training: TrainingSettings) -> Machine:
    """Collective: the machine of this run, with the smallest memory of all processes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    cuda = not trains_on_cpu(training)
    if cuda:
        free, total = torch.cuda.mem_get_info()
        memory = min(total, free + GIB)  # the plan counts this process's CUDA context itself
    else:
        memory = available_memory() / local
    memory = min(memory, (training.gpu_memory_gb or float("inf")) * GIB)
    bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    flash = cuda and gpu_runs_flash_attention() and is_flash_attn_2_available()
    name = torch.cuda.get_device_name() if cuda else None
    memories, bfloat16s, flashes, names = zip(
        *all_gather((memory, bfloat16, flash, name)), strict=True
    )
    return Machine(
        world_size(),
        "cuda" if cuda else "cpu",
        min(memories),
        launched_engine(),
        local,
        all(bfloat16s),
        all(flashes),
        machine_file(training.machine, set(names)),
    )


def machine_file(name: str, devices: set[str | None]) -> MachineFile:
    """The machine file that a run reads; different devices have none in common."""
    if name not in (AUTO, NONE):
        return read_machine_file(name)
    files = {machine_file_for(device) for device in devices} if name == AUTO else set()
    return files.pop() if len(files) == 1 else MachineFile()


def trains_on_cpu(training: TrainingSettings) -> bool:
    """Whether this run computes on the CPU."""
    if training.use_cpu != AUTO:
        return training.use_cpu
    return set_by_accelerate("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def launched_engine() -> dict | None:
    """The student's DeepSpeed configuration if accelerate's configuration has one."""
    if not set_by_accelerate("ACCELERATE_USE_DEEPSPEED"):
        return None
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin().hf_ds_config.config


def available_memory() -> float:
    """Bytes of host memory that are available now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
