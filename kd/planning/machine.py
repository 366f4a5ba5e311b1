"""The machine of a run: number of processes, device, memory per process."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from kd.distributed import all_gather
from kd.planning.layout import GIB
from kd.settings.training import TrainingSettings


@dataclass(frozen=True)
class Machine:
    """The part of a layout that a launch profile decides."""

    processes: int
    device: str  # cuda or cpu
    memory: float  # bytes that a process may use on its device
    zero: dict | None = None  # the student's DeepSpeed JSON
    per_machine: int | None = None  # processes per machine; None: all of them


def present_machine(training: TrainingSettings) -> Machine:
    """Collective: the machine of this run, with the smallest memory of all processes."""
    processes = training.world_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if training.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory = min(total, free + GIB)  # the plan counts this process's CUDA context itself
    else:
        memory = available_memory() / local
    memory = min(memory, (training.gpu_memory_gb or float("inf")) * GIB)
    plugin = getattr(training, "deepspeed_plugin", None)
    zero = plugin.hf_ds_config.config if plugin else None
    return Machine(processes, training.device.type, min(all_gather(memory)), zero, local)


def available_memory() -> float:
    """Bytes of host memory that are available now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
