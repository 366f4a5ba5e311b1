"""The layout of a run, which determines its memory and time, and the memory plan of a layout."""

from dataclasses import dataclass, field
from typing import Any

from kd.settings.distillation import ModelSettings, Objective, OnPolicySettings

GIB = 2**30
# Share of a device's memory that a run must leave free to fit: the plan may be wrong by as much.
SPARE = 0.08


@dataclass(frozen=True)
class Layout:
    """Everything that the memory and the time of a run depend on."""

    student: str  # hub name or folder, as is `teacher`
    model: ModelSettings  # with its dtype resolved
    micro: int  # rows per micro-batch
    accumulation: int  # micro-batches per process and step
    max_length: int  # tokens per row
    processes: int
    memory: float  # bytes that a process may use on its device
    teacher: str | None = None
    teacher_dtype: str = "auto"
    teacher_shards: dict | None = field(default=None, hash=False)  # its ZeRO-3 JSON
    teacher_workspace: float = 0.0  # bytes for the hidden states of a sharded teacher
    zero: dict | None = field(default=None, hash=False)  # the student's DeepSpeed JSON
    objective: Objective = Objective()
    hidden_pairs: int = 0  # pairs of layers in the hidden-state loss
    half: str | None = None  # bfloat16 or float16: the mixed precision of the launch profile
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    packing: bool = False
    device: str = "cuda"
    repeats_keys: bool = False  # whether attention gets keys and values repeated for every query
    per_machine: int | None = None  # processes per machine; None: all of them
    teacher_processes: int | None = None  # that share one sharded teacher; None: all of them
    on_policy: OnPolicySettings | None = field(default=None, hash=False)

    @property
    def stage(self) -> int:
        """ZeRO stage of the student; 0 for DDP or a single process."""
        return (self.zero or {}).get("zero_optimization", {}).get("stage", 0)

    @property
    def local_processes(self) -> int:
        """Processes on one machine."""
        return min(self.per_machine or self.processes, self.processes)

    @property
    def teacher_group(self) -> int:
        """Processes among which one sharded teacher is divided."""
        return self.teacher_processes or self.processes

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro * self.max_length


@dataclass(frozen=True)
class Plan:
    """The memory that a layout needs, part by part, in bytes."""

    layout: Layout
    held: dict[str, float]  # occupied all the time
    phases: dict[str, dict[str, float]]  # occupied in addition, by phase of a step
    host: dict[str, float]  # host memory of one machine

    @property
    def worst(self) -> str:
        """The phase with the most memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """All parts that are occupied in the worst phase."""
        parts = self.held | self.phases[self.worst]
        return {name: size for name, size in parts.items() if size}

    @property
    def total(self) -> float:
        """Peak memory of a process in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak leaves SPARE of the device's memory free."""
        return self.share <= 1 - SPARE

    @property
    def exceeds(self) -> bool:
        """Whether the peak is more than the whole memory of the device."""
        return self.share > 1

    @property
    def verdict(self) -> str:
        """Whether the run fits, in words."""
        if self.fits:
            return "fits"
        return "DOES NOT FIT" if self.exceeds else f"leaves less than {SPARE:.0%} free"

    @property
    def share(self) -> float:
        """The peak as a share of the memory of the device."""
        return self.total / self.layout.memory

    def record(self) -> dict[str, Any]:
        """The plan as run.json stores it."""
        layout = self.layout
        return {
            "processes": layout.processes,
            "rows": layout.micro,
            "accumulation": layout.accumulation,
            "length": layout.max_length,
            "worst": self.worst,
            "bytes": {name: round(size) for name, size in self.parts.items()},
            "total": round(self.total),
            "of": round(layout.memory),
            "host": {name: round(size) for name, size in self.host.items()},
        }

    def __str__(self) -> str:
        layout = self.layout
        unit = "GPU" if layout.device == "cuda" else "process"
        processes = f"{layout.processes} process{'es' if layout.processes > 1 else ''}"
        lines = [
            f"peak memory per {unit}, during {self.worst}; {processes} x {layout.micro} rows of "
            f"{layout.max_length} tokens"
        ]
        lines += [size_line(name, size) for name, size in self.parts.items()]
        total = f"total, of {layout.memory / GIB:.1f} GiB: {self.verdict}"
        lines.append(size_line(total, self.total))
        if layout.device == "cuda":
            name = f"host memory per machine ({', '.join(self.host)})"
            lines.append(size_line(name, sum(self.host.values())))
        return "\n".join(lines)


def size_line(name: str, size: float) -> str:
    """One line of a table of sizes; `size` is in bytes."""
    return f"  {name:<60}{size / GIB:8.3f} GiB"
