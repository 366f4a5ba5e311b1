"""Will a run fit, and how long will it take? From configurations alone: no weights, no GPU.

launch/2xa100.sh train/plan.py --config recipes/small/d_distill.yaml

Takes the recipe and the flags of train/sft.py or train/distill.py. One plain process, whatever the
profile: it plans for the profile's processes and GPUs (GPU_MEMORY_GB=40 for smaller ones).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from kd.losses.objective import Objective
from kd.planning.fitting import Machine, available_memory, fit, layout_of
from kd.planning.layout import GIB, Plan
from kd.planning.throughput import (
    Duration,
    Rates,
    describe_disk,
    disk_bytes,
    duration,
    measure,
)
from kd.recipe import parse, require_file, setting
from kd.run.exit import run
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    OnPolicySettings,
    TeacherSettings,
)
from kd.settings.training import TrainingSettings
from kd.training.preparation import objectives, with_dtype


@dataclass
class PlanSettings:
    model: str | None = setting(None, "as in train/sft.py")
    student: str | None = setting(None, "as in train/distill.py")
    accelerate_config: str | None = setting(
        None, "the profile's: number of processes, DeepSpeed JSON; without: one plain process"
    )
    num_processes: int | None = setting(None, "in place of the accelerate configuration's")
    rows: int | None = setting(None, "training rows, where the recipe does not tell")
    tflops: float | None = setting(None, "matrix rate of a GPU, 1e12 operations a second")
    memory_gb_s: float | None = setting(None, "memory rate of a GPU, 1e9 bytes a second")
    link_gb_s: float = setting(10.0, "rate of a process to the others, 1e9 bytes a second")
    efficiency: float = setting(0.5, "share of the matrix rate that a step reaches (assumed)")
    measure: bool = setting(False, "take both rates from the present device")
    json: str | None = setting(None, "file for the plan")

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.student):
            raise ValueError("model, student: wanted one of them, as sft.py or distill.py take it")
        require_file("accelerate_config", self.accelerate_config)


@dataclass
class PlannedTeacher(TeacherSettings):
    """A profile gives its flags of the teacher to every plan; fine-tuning has none."""

    def __post_init__(self) -> None:
        if self.teacher or self.teacher_cache:
            super().__post_init__()


@dataclass
class PlannedTraining(TrainingSettings):
    """The keys alone: Transformers' own part would ask for the GPUs of the profile."""

    def __post_init__(self) -> None:
        pass


def main() -> None:
    settings, teacher, objective_settings, on_policy, model, data, training = parse(
        PlanSettings,
        PlannedTeacher,
        Objective,
        OnPolicySettings,
        ModelSettings,
        DataSettings,
        PlannedTraining,
        description=__doc__,
    )
    name = settings.student or settings.model
    if settings.student and not teacher.teacher and not teacher.teacher_cache:
        raise ValueError("teacher: not given; wanted a hub name or a folder")
    machine = planned_machine(settings, training)
    training.settle_batch(machine.processes)
    model = with_dtype(model, training, machine.zero is not None)
    objective, hidden = Objective(soft_weight=0.0), None
    if settings.student and teacher.teacher:
        objective, hidden = objectives(objective_settings, name, teacher.teacher)
    pairs = len(hidden.layers) if hidden else 0
    layout = layout_of(
        name,
        data.max_length,
        model,
        data,
        training,
        teacher if settings.student else None,
        objective,
        pairs,
        machine,
        on_policy if settings.student else None,
    )
    found = fit(layout, training.micro_batch_given)
    print(found)
    time = duration(found.layout, rates(settings, training, machine.device))
    print(time)
    rows = settings.rows or count_rows(data)
    print(whole_run(training, time, rows))
    disk = disk_bytes(found.layout, training.save_total_limit or 1)
    print(describe_disk(disk))
    if settings.json:
        write(settings.json, found, time, disk)


def planned_machine(settings: PlanSettings, training: TrainingSettings) -> Machine:
    """Raises ValueError where nothing says how much memory a GPU has."""
    config = {"num_processes": 1, "use_cpu": bool(training.use_cpu)}
    if settings.accelerate_config:
        config |= yaml.safe_load(Path(settings.accelerate_config).read_text())
    processes = settings.num_processes or config["num_processes"]
    path = training.deepspeed or config.get("deepspeed_config", {}).get("deepspeed_config_file")
    zero = json.loads(Path(path).read_text()) if path else None
    per_machine = -(-processes // config.get("num_machines", 1))
    if config["use_cpu"] or training.use_cpu:
        memory = available_memory() / per_machine
        memory = min(memory, (training.gpu_memory_gb or float("inf")) * GIB)
        return Machine(processes, "cpu", memory, zero, per_machine)
    memory = training.gpu_memory_gb
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if memory is None:
        raise ValueError(
            "gpu_memory_gb: not given, and there is no GPU here to ask; wanted GiB of one GPU"
        )
    return Machine(processes, "cuda", memory * GIB, zero, per_machine)


def rates(settings: PlanSettings, training: TrainingSettings, device: str) -> Rates:
    if settings.measure or not (settings.tflops and settings.memory_gb_s):
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "tflops, memory_gb_s: not given, and there is no GPU here to measure; a profile "
                "gives its GPU's"
            )
        half = torch.float16 if training.fp16 else torch.bfloat16
        dtype = half if training.fp16 or training.bf16 else torch.float32
        return measure(device, dtype, settings.link_gb_s, settings.efficiency)
    return Rates(settings.tflops, settings.memory_gb_s, settings.link_gb_s, settings.efficiency)


def count_rows(data: DataSettings) -> int | None:
    """Rows before packing; None where only reading a source could tell."""
    counts = []
    for source in data.sources:
        path = source["path"]
        if "count" in source:
            counts.append(source["count"])
        elif path.endswith(".jsonl") and Path(path).is_file():
            with open(path, encoding="utf-8") as file:
                counts.append(sum(bool(line.strip()) for line in file))
        else:
            return None
    return min(sum(counts), data.train_rows or sum(counts))


def whole_run(training: TrainingSettings, time: Duration, rows: int | None) -> str:
    steps = training.max_steps
    if steps <= 0 and rows is None:
        return "hours: unknown, since a source has no count; --rows tells how many rows there are"
    if steps <= 0:
        steps = max(1, round(training.num_train_epochs * rows / training.global_batch_size))
    hours, tokens = steps * time.step / 3600, steps * time.tokens
    return f"run: {steps} steps, {hours:.1f} hours, at most {tokens / 1e6:.1f} M tokens (full rows)"


def write(path: str, found: Plan, time: Duration, disk: dict[str, float]) -> None:
    record = found.record() | {"seconds a step": time.seconds, "disk": disk}
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
