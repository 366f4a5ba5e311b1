"""Parse a recipe for planning: the flags of the training scripts, for a machine not present."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kd.recipe import (
    all_mistakes,
    check_ranges,
    mistake,
    parse,
    setting,
)
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    Objective,
    OnPolicySettings,
)
from kd.settings.machine_file import NO_GPU, RateKeys
from kd.settings.model_paths import require_model
from kd.settings.teacher import TeacherSettings
from kd.settings.training import TrainingSettings
from kd.settings.training_recipe import Recipe

# Where neither the command line nor the machine file says; the latencies are those of NCCL over
# PCIe and a network (launch/machines/t4.yaml).
SLOW = {
    "link_gb_s": 10.0,
    "network_gb_s": 10.0,
    "link_latency_us": 5.7,
    "network_latency_us": 14.0,
}

if TYPE_CHECKING:  # a mistake in the recipe is told before torch is imported, which takes seconds
    from kd.planning.device_rates import Rates
    from kd.planning.machine import Machine


@dataclass(frozen=True)
class PlanSettings(RateKeys):
    """The settings of train/plan.py that no training script has."""

    model: str | None = setting(None, "Model to fine-tune, as in train/sft.py.")
    student: str | None = setting(None, "Student to distil into, as in train/distill.py.")
    num_processes: int = setting(1, "Number of processes, over all machines.", least=1)
    num_machines: int = setting(1, "Number of machines.", least=1)
    rows: int | None = setting(
        None, "Number of training rows. Needed only if the recipe does not state it.", least=1
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
        if self.num_processes % self.num_machines:
            mistake(
                f"num_processes: {self.num_processes}; wanted a multiple of num_machines "
                f"({self.num_machines})"
            )


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
    recipe = Recipe(name, model, data, training, *distillation)
    return settings, recipe, machine


def planned_machine(settings: PlanSettings, training: TrainingSettings) -> "Machine":
    """The machine to plan for. Raises ValueError if a GPU's memory is unknown."""
    import torch

    from kd.planning.layout import GIB
    from kd.planning.machine import Machine, available_memory, machine_file, trains_on_cpu

    here = torch.cuda.is_available()
    file = machine_file(training.machine, {torch.cuda.get_device_name() if here else None})
    elsewhere = file.gpu not in ("", NO_GPU)  # a machine with GPUs, which need not be present
    processes, per_machine = settings.num_processes, settings.num_processes // settings.num_machines
    if training.use_cpu is True or not elsewhere and trains_on_cpu(training):
        memory = available_memory() / per_machine
        memory = min(memory, (training.gpu_memory_gb or float("inf")) * GIB)
        return Machine(processes, "cpu", memory, None, per_machine, file=file)
    memory = training.gpu_memory_gb or file.memory_gb
    if memory is None and here:
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
    if memory is None:
        raise ValueError("gpu_memory_gb: not given, and there is no GPU here; wanted GiB per GPU")
    bfloat16 = file.preferences.precision != "float16"  # preferred only where bfloat16 is missing
    return Machine(processes, "cuda", memory * GIB, None, per_machine, bfloat16, file=file)


def planned_rates(
    settings: PlanSettings, training: TrainingSettings, machine: "Machine"
) -> "Rates":
    """The rates given, else those of the machine file, else measured here.

    Raises ValueError if there is no GPU to measure.
    """
    import torch

    from kd.planning.device_rates import Rates, measure_rates

    tflops, memory = (
        getattr(settings, name) or getattr(machine.file, name) for name in ("tflops", "memory_gb_s")
    )
    others = {n: getattr(settings, n) or getattr(machine.file, n) or SLOW[n] for n in SLOW}
    others["efficiency"] = settings.efficiency
    if settings.measure or not (tflops and memory):
        if machine.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "tflops, memory_gb_s: not given, and there is no GPU here to measure; wanted both, "
                "or a machine file with them"
            )
        dtype = getattr(torch, training.precision)
        return measure_rates(machine.device, dtype, **others)
    return Rates(tflops, memory, **others)
