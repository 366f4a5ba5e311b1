"""Parse a recipe for planning: the flags of the training scripts, for a machine not present."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from kd.recipe import (
    all_mistakes,
    check_ranges,
    mistake,
    parse,
    require_file,
    setting,
)
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    Objective,
    OnPolicySettings,
    TeacherSettings,
)
from kd.settings.model_paths import require_model
from kd.settings.training import TrainingSettings
from kd.settings.training_recipe import Recipe

if TYPE_CHECKING:  # a mistake in the recipe is told before torch is imported, which takes seconds
    from kd.planning.device_rates import Rates
    from kd.planning.machine import Machine


@dataclass
class PlanSettings:
    """The settings of train/plan.py that no training script has."""

    model: str | None = setting(None, "Model to fine-tune, as in train/sft.py.")
    student: str | None = setting(None, "Student to distil into, as in train/distill.py.")
    accelerate_config: str | None = setting(
        None,
        "Accelerate configuration of the launch profile, with the number of processes and the "
        "DeepSpeed JSON. Default: one process without DeepSpeed.",
    )
    num_processes: int | None = setting(
        None, "Number of processes; overrides the one in accelerate_config.", least=1
    )
    rows: int | None = setting(
        None, "Number of training rows. Needed only if the recipe does not state it.", least=1
    )
    tflops: float | None = setting(
        None, "Rate of matrix products of a GPU, in 1e12 operations per second.", above=0
    )
    memory_gb_s: float | None = setting(
        None, "Memory rate of a GPU, in 1e9 bytes per second.", above=0
    )
    link_gb_s: float = setting(
        10.0, "Rate at which a process sends to the others, in 1e9 bytes per second.", above=0
    )
    efficiency: float = setting(
        0.5,
        "Share of the rate of matrix products that a training step is assumed to reach.",
        above=0,
        most=1,
    )
    measure: bool = setting(
        False, "Measure the rates of matrix products and memory on the present device."
    )
    json: str | None = setting(None, "JSON file to write the plan to.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if bool(self.model) == bool(self.student):
            mistake("model, student: wanted exactly one, as in train/sft.py or train/distill.py")
        require_file("accelerate_config", self.accelerate_config)


@dataclass
class PlannedTeacher(TeacherSettings):
    """TeacherSettings without a required teacher: a profile's flags also apply to fine-tuning."""

    def __post_init__(self) -> None:
        if self.teacher or self.teacher_cache:
            super().__post_init__()


@dataclass
class PlannedTraining(TrainingSettings):
    """TrainingSettings whose batch is derived later, for the processes of the profile."""

    def __post_init__(self) -> None:
        self.check_keys()


def parse_plan(description: str) -> tuple[PlanSettings, Recipe, "Machine"]:
    """Parse the command line of train/plan.py. Raises ValueError for mistakes in the recipe."""
    with all_mistakes():
        settings, teacher, objective, on_policy, model, data, training = parse(
            PlanSettings,
            PlannedTeacher,
            Objective,
            OnPolicySettings,
            ModelSettings,
            DataSettings,
            PlannedTraining,
            description=description,
        )
        if settings.student and not teacher.teacher_cache:
            require_model("teacher", teacher.teacher)
    machine = planned_machine(settings, training)
    training.settle_batch(machine.processes)
    name = settings.student or settings.model
    distillation = (teacher, objective, on_policy) if settings.student else ()
    recipe = Recipe(name, model, data, training, *distillation, deepspeed=machine.zero is not None)
    return settings, recipe, machine


def beside(accelerate_config: str, path: str) -> Path:
    """A path that a configuration in accelerate_configs/ gives relative to the repository."""
    return Path(accelerate_config).resolve().parents[1] / path


def planned_machine(settings: PlanSettings, training: TrainingSettings) -> "Machine":
    """The machine of a launch profile. Raises ValueError if a GPU's memory is unknown."""
    import torch

    from kd.planning.layout import GIB
    from kd.planning.machine import Machine, available_memory

    config = {"num_processes": 1, "use_cpu": bool(training.use_cpu)}
    if settings.accelerate_config:
        config |= yaml.safe_load(Path(settings.accelerate_config).read_text())
    processes = settings.num_processes or config["num_processes"]
    path, own = training.deepspeed, config.get("deepspeed_config", {}).get("deepspeed_config_file")
    if own and not path:  # relative to the repository; the caller may be in another folder
        path = own if Path(own).is_file() else beside(settings.accelerate_config, own)
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
        raise ValueError("gpu_memory_gb: not given, and there is no GPU here; wanted GiB per GPU")
    return Machine(processes, "cuda", memory * GIB, zero, per_machine)


def planned_rates(settings: PlanSettings, training: TrainingSettings, device: str) -> "Rates":
    """The rates given, or measured here. Raises ValueError if there is no GPU to measure."""
    import torch

    from kd.planning.device_rates import Rates, measure_rates

    if settings.measure or not (settings.tflops and settings.memory_gb_s):
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "tflops, memory_gb_s: not given, and there is no GPU here to measure; wanted both, "
                "as a launch profile gives them"
            )
        half = torch.float16 if training.fp16 else torch.bfloat16
        dtype = half if training.fp16 or training.bf16 else torch.float32
        return measure_rates(device, dtype, settings.link_gb_s, settings.efficiency)
    return Rates(settings.tflops, settings.memory_gb_s, settings.link_gb_s, settings.efficiency)
