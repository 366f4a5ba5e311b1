"""A run's layout: all that its memory and time depend on; and the plan that is made of it."""

from dataclasses import dataclass, field
from typing import Any

from kd.losses.objective import Objective
from kd.settings.distillation import ModelSettings, OnPolicySettings

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """All that memory and time of a run depend on."""

    student: str
    model: ModelSettings  # with its dtype decided
    micro: int
    accumulation: int
    max_length: int
    processes: int
    memory: float  # bytes that a process may use on its device
    teacher: str | None = None
    teacher_dtype: str = "auto"
    teacher_shards: dict | None = field(default=None, hash=False)  # the ZeRO-3 JSON
    teacher_workspace: float = 0.0  # bytes for the states of a sharded teacher
    zero: dict | None = field(default=None, hash=False)  # the student's JSON, None without it
    objective: Objective = Objective(soft_weight=0.0)
    hidden_pairs: int = 0
    half: str | None = None  # bfloat16, float16: the precision of the launch profile
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    packing: bool = False
    device: str = "cuda"
    per_machine: int | None = None  # processes a machine; None: all of them
    on_policy: OnPolicySettings | None = field(default=None, hash=False)  # where it writes itself

    @property
    def stage(self) -> int:
        """ZeRO stage of the student; 0: DDP, or one process alone."""
        return (self.zero or {}).get("zero_optimization", {}).get("stage", 0)

    @property
    def tokens(self) -> int:
        return self.micro * self.max_length


@dataclass(frozen=True)
class Plan:
    layout: Layout
    held: dict[str, float]  # bytes all the time
    phases: dict[str, dict[str, float]]  # bytes on top of them, by the moment of a step
    host: dict[str, float]  # bytes of a machine's own memory

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """What is held, and what the worst moment adds."""
        parts = self.held | self.phases[self.worst]
        return {name: size for name, size in parts.items() if size}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.layout.memory

    def record(self) -> dict[str, Any]:
        """For run.json."""
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
        where = "GPU" if layout.device == "cuda" else "process"
        lines = [
            f"memory a {where} at its worst, {self.worst}; {layout.processes} x {layout.micro} rows "
            f"of {layout.max_length} tokens"
        ]
        lines += [line(name, size) for name, size in self.parts.items()]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        total = f"total of {layout.memory / GIB:.1f} GiB: {verdict}"
        lines.append(line(total, self.total))
        if layout.device == "cuda":
            name = f"host memory a machine ({', '.join(self.host)})"
            lines.append(line(name, sum(self.host.values())))
        return "\n".join(lines)


def line(name: str, size: float) -> str:
    return f"  {name:<60}{size / GIB:8.3f} GiB"
