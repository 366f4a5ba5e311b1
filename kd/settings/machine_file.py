"""Machine files: what a kind of machine prefers for keys that are `auto`, and its rates.

Every road to a run reads them: the launch files, accelerate, torchrun, SLURM and plain Python.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd.recipe import check_ranges, mistake, parse, setting

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "launch" / "machines"
NO_GPU = "none"
Precision = Literal["bfloat16", "float16", "float32"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class Preferences:
    """What a machine prefers for keys of a recipe that are `auto`."""

    precision: Precision | None = None
    attn_implementation: Attention | None = None
    gradient_checkpointing: bool | None = None
    max_per_device_train_batch_size: int | None = setting(
        None, "Upper limit of the micro-batch in rows.", least=1
    )
    deepspeed: str | None = None
    teacher_deepspeed: str | None = None
    teacher_dtype: Precision | None = None
    loss_workspace_mb: int | None = setting(
        None, "Memory for logits in the loss, in MiB per device.", least=128
    )
    teacher_workspace_mb: int | None = setting(
        None, "Memory for the hidden states of a sharded teacher, in MiB per device.", least=0
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def given(self) -> dict[str, Any]:
        """The preferences that the file has."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RateKeys:
    """The rates of a machine, from which the time of a step is planned."""

    tflops: float | None = setting(
        None,
        "Rate of matrix products of a GPU, in 1e12 operations per second. train/plan.py takes this "
        "rate and the next five from the machine file where they are not given.",
        above=0,
    )
    memory_gb_s: float | None = setting(
        None, "Memory rate of a GPU, in 1e9 bytes per second.", above=0
    )
    link_gb_s: float | None = setting(
        None,
        "Rate at which a process sends to the others of its machine, in 1e9 bytes per second.",
        above=0,
    )
    network_gb_s: float | None = setting(
        None,
        "Rate at which a process sends to other machines, in 1e9 bytes per second: that of all "
        "network links of a machine, divided by its processes.",
        above=0,
    )
    link_latency_us: float | None = setting(
        None, "Latency of a ring's hop within a machine, in microseconds.", above=0
    )
    network_latency_us: float | None = setting(
        None, "Latency of a ring's hop between machines, in microseconds.", above=0
    )


@dataclass(frozen=True)
class MachineFile(RateKeys):
    """A machine file; without one, every choice is left to the plan."""

    name: str = dataclasses.field(default="none", init=False)
    preferences: Preferences = dataclasses.field(default=Preferences(), init=False)
    gpu: str = setting("", "Word of the name that the driver reports; none stands for a CPU.")
    memory_gb: float | None = setting(
        None, "Memory of a GPU in GiB, for plans made on another machine.", above=0
    )

    def __post_init__(self) -> None:
        check_ranges(self)


def read_machine_file(name: str) -> MachineFile:
    """Read a machine file by its name in launch/machines/, or by its path.

    Raises ValueError for a file that does not exist, and for keys and values that are not known.
    """
    path = Path(name) if Path(name).is_file() else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        mistake(f"machine: no file {name}; wanted auto, none, a path, or one of {known}")
        return MachineFile()
    machine, preferences = parse(MachineFile, Preferences, argv=["--config", str(path)])
    object.__setattr__(machine, "name", path.stem)
    object.__setattr__(machine, "preferences", preferences)
    return machine


def machine_file_for(device_name: str | None) -> MachineFile:
    """The machine file whose GPU is a word of the name that the driver reports; None: a CPU."""
    for path in sorted(FOLDER.glob("*.yaml")):
        found = read_machine_file(path.stem)
        word = rf"\b{re.escape(found.gpu or NO_GPU)}\b"
        if found.gpu == NO_GPU if device_name is None else re.search(word, device_name):
            return found
    return MachineFile()


def repository_file(path: str) -> Path:
    """The file `path`, of the present folder or else of the repository; it may not exist."""
    own = REPOSITORY / path
    return own if own.is_file() and not Path(path).is_file() else Path(path)
