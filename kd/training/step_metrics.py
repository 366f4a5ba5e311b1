"""The metrics that a run logs in addition to Trainer's own: summed on the device, read per log.

A mean is a sum over the target tokens of all ranks divided by their number, so every token counts
the same on any rank and in any micro-batch. Nothing here waits for the device within a step.
kd.losses.metrics lists the metrics.
"""

import torch
from torch import Tensor

from kd.distributed import all_max, all_sum, world_size
from kd.losses.metrics import BY_NAME, REPORTED
from kd.planning.throughput import MatrixWork
from kd.run.host_memory import PeakMemory
from kd.training.step_times import StepTimes

GIB = 2**30
SHARES = ("matrix_peak_share", "model_flop_utilization")


class StepMetrics:
    """Sums since the last log, on this rank.

    Attributes:
        shown: Names of the token metrics to log.
        work: The operations of the run; None leaves out the shares of the peak.
        times: Seconds per phase of a step.
        student_pace: Seconds in the student's forward and loss on this rank, and positions, in the
            interval of the last `read`.
        completions: Student-generated answers, their tokens, and how many reached the length limit.
    """

    def __init__(
        self,
        device: torch.device,
        shown: list[str],
        work: MatrixWork | None = None,
    ) -> None:
        self.device = device
        self.shown = shown
        self.work = work
        self.student_pace = (0.0, 0)
        self.times = StepTimes(device)
        self.host_memory = None if device.type == "cuda" else PeakMemory()
        self.shares = dict.fromkeys(SHARES, 0.0)  # summed over the seconds of all steps
        self.seconds = 0.0
        self._reset()

    def _reset(self) -> None:
        # float32 would stop counting tokens at 2^24.
        self.sums = torch.zeros(len(REPORTED), dtype=torch.float64, device=self.device)
        self.tokens_read = torch.zeros((), dtype=torch.long, device=self.device)
        self.positions = 0
        self.completions = [0, 0, 0]

    def add_completions(self, answers: list[list[int]], cut: int) -> None:
        """Add the token ids of a step's student-generated answers, `cut` of them at the limit."""
        new = (len(answers), sum(map(len, answers)), cut)
        self.completions = [a + b for a, b in zip(self.completions, new, strict=True)]

    def add(self, sums: Tensor, batch: dict[str, Tensor]) -> None:
        """Add a micro-batch and the sums, (len(REPORTED),), that the student returned for it."""
        self.sums += sums
        self.tokens_read += batch["tokens"].sum()
        self.positions += batch["input_ids"].numel()

    def memory_bytes(self) -> int:
        """Return this process's peak memory: of the GPU, or the machine's if it runs on a CPU."""
        if self.host_memory:
            return self.host_memory.read()
        return torch.cuda.max_memory_allocated(self.device)

    def read(self) -> dict[str, float]:
        """Collective: return the metrics since the last call over all ranks, and start again."""
        phases, step, steps = self.times.read()
        counts = torch.tensor(
            [self.positions, *self.completions, *phases.values()], device=self.device
        )
        totals = all_sum(torch.cat([self.sums.double(), self.tokens_read.double()[None], counts]))
        highest = torch.tensor([step, self.memory_bytes()], dtype=torch.float64, device=self.device)
        slowest, memory = all_max(highest).tolist()
        self.student_pace = (phases["student"] + phases["loss"], self.positions)
        self._reset()

        sums, rest = totals[: len(REPORTED)], totals[len(REPORTED) :].tolist()
        read, positions, answers, answer_tokens, cut, *seconds = rest
        metrics = means_over_tokens(sums, self.shown)
        metrics["padding_share"] = 1 - read / positions if positions else 0.0
        metrics["memory_gib"] = memory / GIB
        if answers:
            metrics["generated_length"] = answer_tokens / answers
            metrics["generated_cut_share"] = cut / answers
        if slowest:
            tokens = sum(sums[REPORTED.index(x)].item() for x in ("tokens", "on_policy_tokens"))
            metrics["target_tokens_per_second"] = tokens / slowest
            for phase, total in zip(phases, seconds, strict=True):
                if total or phase != "generation":
                    metrics[f"seconds_{phase}"] = total / world_size() / steps
            metrics["seconds_step"] = slowest / steps
        if slowest and self.work:
            metrics |= self.shares_of_peak(read, positions, tokens, slowest)
        return metrics

    def shares_of_peak(
        self, read: float, positions: float, tokens: float, seconds: float
    ) -> dict[str, float]:
        """Shares of the measured and of the vendor's matrix rate, by all ranks in `seconds`.

        The first counts what the devices compute, the second what the models need: the `read`
        tokens without padding.
        """
        work, device_seconds = self.work, world_size() * seconds
        computed = work.per_position * positions + work.per_target * tokens
        found = {"matrix_peak_share": computed / device_seconds / work.measured_rate}
        if work.vendor_rate:
            needed = work.model_per_token * read
            found["model_flop_utilization"] = needed / device_seconds / work.vendor_rate
        for name, share in found.items():
            self.shares[name] += share * seconds
        self.seconds += seconds
        return found

    def mean_shares(self) -> dict[str, float]:
        """The shares of the peak over all logged steps of this start; {} where there are none."""
        return {name: total / self.seconds for name, total in self.shares.items() if total}


def reproducible(logged: dict[str, float]) -> dict[str, float]:
    """Keep the metrics that do not depend on the machine: a repeated run logs them bit for bit."""
    return {k: v for k, v in logged.items() if not (k in BY_NAME and BY_NAME[k].machine)}


def means_over_tokens(sums: Tensor, shown: list[str]) -> dict[str, float]:
    """Divide the sums of all ranks, (len(REPORTED),), by their numbers of tokens.

    Leaves out means over no tokens.
    """
    values = dict(zip(REPORTED, sums.tolist(), strict=True))
    counts = {name: values[BY_NAME[name].tokens] for name in shown}
    return {name: values[name] / counts[name] for name in shown if counts[name]}
