"""What a run logs beside Trainer's own figures: summed on the device, read when they are logged.

Means are sums over the target tokens of all ranks divided by their number, so that no rank and no
micro-batch counts more than its tokens. Nothing here waits for the device inside a step.
"""

import resource

import torch
from torch import Tensor

from kd.distributed import all_max, all_sum, world_size
from kd.models.heads import REPORTED
from kd.training.step_times import StepTimes

GIB = 2**30
# Beginnings of the names of figures that depend on the machine, and differ where a run is repeated.
OF_THE_MACHINE = ("seconds_", "target_tokens_per_second", "memory_", "matrix_peak_share")


class Figures:
    """Sums since the last log.

    `work`: operations of a position, operations of a target token beside that, and operations a
    second that a device can do.
    """

    def __init__(
        self,
        device: torch.device,
        shown: list[str],
        work: tuple[float, float, float] | None = None,
    ) -> None:
        self.device = device
        self.shown = shown
        self.work = work
        self.own_pace = (0.0, 0)  # seconds of this rank's student, positions, at the last reading
        self.times = StepTimes(device)
        self.begin()

    def begin(self) -> None:
        self.sums = torch.zeros(len(REPORTED), device=self.device)
        self.tokens_read = torch.zeros((), dtype=torch.long, device=self.device)
        self.positions = 0
        self.written = [0, 0, 0]  # answers of the student's own, their tokens, those cut

    def add_written(self, answers: list[list[int]], cut: int) -> None:
        """Take in what the student has written of a step."""
        new = (len(answers), sum(map(len, answers)), cut)
        self.written = [a + b for a, b in zip(self.written, new, strict=True)]

    def add(self, metrics: Tensor, batch: dict[str, Tensor]) -> None:
        """Take in a micro-batch and the sums that the student's call returned of it."""
        self.sums += metrics
        self.tokens_read += batch["tokens"].sum()
        self.positions += batch["input_ids"].numel()

    def read(self) -> dict[str, float]:
        """The figures since the last call, over all ranks: every rank must call it."""
        phases, step, steps = self.times.read()
        own = torch.tensor([self.positions, *self.written, *phases.values()], device=self.device)
        sums = all_sum(torch.cat([self.sums.double(), self.tokens_read.double()[None], own]))
        highest = torch.tensor(
            [step, memory_bytes(self.device)], dtype=torch.float64, device=self.device
        )
        slowest, memory = all_max(highest).tolist()
        self.own_pace = (phases["student"] + phases["loss"], self.positions)
        self.begin()

        reported, (read, positions, answers, written, cut, *seconds) = (
            sums[: len(REPORTED)],
            sums[len(REPORTED) :].tolist(),
        )
        figures = means_over_tokens(reported, self.shown)
        figures["padding_share"] = 1 - read / positions if positions else 0.0
        figures["memory_gib"] = memory / GIB
        if answers:
            figures["generated_length"] = written / answers
            figures["generated_cut_share"] = cut / answers
        if slowest:
            tokens = sum(reported[REPORTED.index(x)].item() for x in ("tokens", "on_policy_tokens"))
            figures["target_tokens_per_second"] = tokens / slowest
            for phase, total in zip(phases, seconds, strict=True):
                if total or phase != "generation":
                    figures[f"seconds_{phase}"] = total / world_size() / steps  # the mean rank's
            figures["seconds_step"] = slowest / steps
        if slowest and self.work:
            position, target, peak = self.work
            operations = position * positions + target * tokens
            figures["matrix_peak_share"] = operations / world_size() / slowest / peak
        return figures


def of_the_run(logged: dict[str, float]) -> dict[str, float]:
    """What a repeated run logs again to the last bit."""
    return {k: v for k, v in logged.items() if not k.startswith(OF_THE_MACHINE)}


def shown_figures(teacher: bool, hidden: bool) -> list[str]:
    """Those of REPORTED that say something of this run."""
    if not teacher:
        return ["cross_entropy", "student_entropy"]
    shown = [name for name in REPORTED if not name.endswith("tokens")]
    return [name for name in shown if hidden or not name.endswith("hidden")]


def means_over_tokens(sums: Tensor, shown: list[str]) -> dict[str, float]:
    """Sums of all ranks over target tokens, in the order of REPORTED, to means.

    Those over no token at all are left out.
    """
    values = dict(zip(REPORTED, sums.tolist(), strict=True))
    counts = {
        name: values["on_policy_tokens" if name.startswith("on_policy_") else "tokens"]
        for name in shown
    }
    return {name: values[name] / counts[name] for name in shown if counts[name]}


def memory_bytes(device: torch.device) -> int:
    """The most that this process held so far: of the GPU's memory, or on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
