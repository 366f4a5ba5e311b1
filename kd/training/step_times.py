"""Where the time of a step goes: data, generation, teacher, student, loss, backward, optimizer.

On CUDA by events in the stream, which nobody waits for before the figures are read.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn
from transformers import TrainerCallback

PHASES = ("data", "generation", "teacher", "student", "loss", "backward", "optimizer")


class StepTimes(TrainerCallback):
    """Seconds of every phase since the last `read`, on this process.

    Phases may lie inside of each other; an instant counts to the innermost.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.open: list[tuple] = []  # (phase, its begin) of those we are in
        self.spans: list[tuple] = []  # (phase, the phase around it, begin, end)
        self.seconds, self.steps = 0.0, 0
        self.begun: float | None = None

    def begin(self, phase: str) -> None:
        self.open.append((phase, self.now()))

    def end(self) -> None:
        phase, begin = self.open.pop()
        around = self.open[-1][0] if self.open else None
        if self.begun is not None:  # an evaluation calls the models too
            self.spans.append((phase, around, begin, self.now()))

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        self.begin(phase)
        try:
            yield
        finally:
            self.end()

    def now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, module: nn.Module, phase: str) -> None:
        """Count every call of `module` to a phase."""
        module.register_forward_pre_hook(lambda *_: self.begin(phase))
        module.register_forward_hook(lambda *_: self.end())

    def watch_optimizer_of(self, engine: nn.Module) -> None:
        """DeepSpeed's engine updates the weights inside of the backward, without a callback."""
        step = engine.step

        def timed(*args, **kw):
            with self.of("optimizer"):
                return step(*args, **kw)

        engine.step = timed

    def begin_step(self) -> None:
        self.begun = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        self.begin("optimizer")

    def on_optimizer_step(self, args, state, control, **_) -> None:
        self.end()

    def on_step_end(self, args, state, control, **_) -> None:
        """What follows up to the next step (logs, evaluation, a checkpoint) belongs to none."""
        if self.begun is not None:
            self.seconds += time.perf_counter() - self.begun
            self.steps += 1
            self.begun = None

    def read(self) -> tuple[dict[str, float], float, int]:
        """(seconds of every phase, seconds of the steps, steps), all begun anew.

        The one place that waits for the device; what it waits for is the steps' work.
        """
        if self.cuda:
            begin = time.perf_counter()
            torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begin
        phases = dict.fromkeys(PHASES, 0.0)
        for phase, around, begin, end in self.spans:
            seconds = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            phases[phase] += seconds
            if around:
                phases[around] -= seconds
        found = (phases, self.seconds, self.steps)
        self.spans, self.seconds, self.steps = [], 0.0, 0
        return found
