"""Nested phases count once, and time outside of steps does not count."""

import pytest
import torch
from torch import nn

from kd.losses.metrics import PHASES
from kd.training import step_times
from kd.training.step_times import StepTimes


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it: clock.now += 0.02."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    return clock


def test_an_instant_counts_toward_the_innermost_phase(clock):
    times = StepTimes(torch.device("cpu"))
    head = nn.Linear(2, 2)
    times.watch(head, "loss")
    head.register_forward_pre_hook(lambda *_: setattr(clock, "now", clock.now + 0.5))
    times.begin_step()
    clock.now += 1
    with times.phase("backward"):
        clock.now += 2
        with times.phase("student"):
            clock.now += 4
            head(torch.zeros(1, 2))
            clock.now += 8
        clock.now += 16
    times.on_step_end(None, None, None)
    phases, seconds, steps = times.read()
    assert steps == 1
    assert (phases["backward"], phases["student"], phases["loss"]) == (18, 12, 0.5)
    assert sum(phases.values()) == 30.5 and seconds == 31.5  # the first second belongs to no phase


def test_calls_between_steps_do_not_count(clock):
    times = StepTimes(torch.device("cpu"))
    with times.phase("student"):  # an evaluation
        clock.now += 1
    assert times.read() == (dict.fromkeys(PHASES, 0.0), 0.0, 0)


def test_reading_resets_the_times():
    times = StepTimes(torch.device("cpu"))
    times.begin_step()
    with times.phase("data"):
        pass
    times.on_step_end(None, None, None)
    assert times.read()[2] == 1
    assert times.read() == (dict.fromkeys(PHASES, 0.0), 0.0, 0)
