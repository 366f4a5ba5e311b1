"""Where the time of a step goes: data, generation, teacher, student, loss, backward, optimizer.

On CUDA it is measured with events in the stream; nothing waits for them until the times are read.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import nn
from transformers import TrainerCallback

from kd.losses.metrics import PHASES


class StepTimes(TrainerCallback):
    """Seconds per phase since the last `read`, on this process.

    Phases may nest; an instant counts only toward the innermost one.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.open: list[tuple] = []  # (phase, begin), outermost first
        self.spans: list[tuple] = []  # (phase, enclosing phase, begin, end)
        self.seconds, self.steps = 0.0, 0
        self.step_begin: float | None = None

    def begin(self, phase: str) -> None:
        """Enter a phase."""
        self.open.append((phase, self._now()))

    def end(self) -> None:
        """Leave the innermost phase."""
        phase, begin = self.open.pop()
        enclosing = self.open[-1][0] if self.open else None
        if self.step_begin is not None:  # an evaluation calls the models too
            self.spans.append((phase, enclosing, begin, self._now()))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the context toward a phase."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def _now(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, module: nn.Module, phase: str) -> None:
        """Count every call of `module` toward a phase."""
        module.register_forward_pre_hook(lambda *_: self.begin(phase))
        module.register_forward_hook(lambda *_: self.end())

    def watch_optimizer(self, engine: nn.Module) -> None:
        """Time the weight update of a DeepSpeed engine, which no callback announces."""
        step = engine.step

        def timed_step(*args, **kw):
            with self.phase("optimizer"):
                return step(*args, **kw)

        engine.step = timed_step

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self.step_begin = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        """Enter the optimizer phase."""
        self.begin("optimizer")

    def on_optimizer_step(self, args, state, control, **_) -> None:
        """Leave the optimizer phase."""
        self.end()

    def on_step_end(self, args, state, control, **_) -> None:
        """Stop the clock: logs, evaluation and checkpoints between steps count toward no step."""
        if self.step_begin is not None:
            self.seconds += time.perf_counter() - self.step_begin
            self.steps += 1
            self.step_begin = None

    def read(self) -> tuple[dict[str, float], float, int]:
        """Return (seconds per phase, seconds of all steps, number of steps) and start again.

        Only this waits for the device; it waits for the work of the steps.
        """
        if self.cuda:
            begin = time.perf_counter()
            torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begin
        phases = dict.fromkeys(PHASES, 0.0)
        for phase, enclosing, begin, end in self.spans:
            seconds = begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            phases[phase] += seconds
            if enclosing:
                phases[enclosing] -= seconds
        result = (phases, self.seconds, self.steps)
        self.spans, self.seconds, self.steps = [], 0.0, 0
        return result
