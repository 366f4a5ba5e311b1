"""Phases inside of phases count once, and what is no step's is not counted."""

import time

import pytest
import torch
from torch import nn

from kd.training.step_times import PHASES, StepTimes


def test_an_instant_counts_to_the_innermost_phase():
    times = StepTimes(torch.device("cpu"))
    head = nn.Linear(2, 2)
    times.watch(head, "loss")
    times.begin_step()
    with times.of("backward"):
        time.sleep(0.02)
        with times.of("student"):
            time.sleep(0.04)
            head(torch.zeros(1, 2))
    times.on_step_end(None, None, None)
    phases, seconds, steps = times.read()
    assert steps == 1
    assert 0.02 <= phases["backward"] < 0.04 <= phases["student"] < seconds
    assert phases["loss"] > 0
    assert sum(phases.values()) == pytest.approx(seconds, rel=0.1)


def test_calls_between_steps_are_no_steps_time():
    times = StepTimes(torch.device("cpu"))
    with times.of("student"):  # an evaluation
        time.sleep(0.01)
    assert times.read() == (dict.fromkeys(PHASES, 0.0), 0.0, 0)


def test_reading_begins_anew():
    times = StepTimes(torch.device("cpu"))
    times.begin_step()
    with times.of("data"):
        pass
    times.on_step_end(None, None, None)
    assert times.read()[2] == 1
    assert times.read() == (dict.fromkeys(PHASES, 0.0), 0.0, 0)
