"""The length-controlled win rate beside alpaca_eval's own numbers, and what must hold of any."""

import json
import math
from pathlib import Path

import pytest

from kd.evaluation.judge.judging import length_control
from kd.evaluation.judge.length_control import FOLDS, length_controlled_win_rate

CASES = json.loads(Path(__file__).with_name("length_control.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_equals_alpaca_evals_minimal_variant(case):
    """The numbers are the package's own; make_length_control.py beside this file made them."""
    lengths, baselines, preferences = zip(*CASES[case]["judgements"], strict=True)
    found = length_controlled_win_rate(list(preferences), list(lengths), list(baselines))
    wanted = CASES[case]["alpaca_eval"]
    assert 100 * found == pytest.approx(wanted["length_controlled_winrate"], rel=1e-6)
    assert abs(found - wanted["win_rate"] / 100) > 0.005  # it does something


def test_a_model_that_wins_by_length_alone_wins_half_at_equal_length():
    lengths = [100 + 10 * i for i in range(60)]
    baselines = [400] * 60
    wins = [1 / (1 + 2.718 ** (-(a - b) / 100)) for a, b in zip(lengths, baselines, strict=True)]
    more = [w for w in wins if w > 0.5]
    assert len(more) != 30
    assert length_controlled_win_rate(wins, lengths, baselines) == pytest.approx(0.5, abs=0.05)


def test_equal_lengths_leave_the_win_rate_as_it_is():
    wins = [0.9, 0.2, 0.7, 0.6, 1.0, 0.5, 0.8, 0.4] * 20
    found = length_controlled_win_rate(wins, [50] * 160, [50] * 160)
    assert found == pytest.approx(sum(wins) / 160, abs=0.01)


def test_a_hard_instruction_is_not_taken_for_the_length_of_its_answer():
    """Preferences depend on the instruction alone; easy ones have the longer answers."""
    easy = [i % 5 > 0 for i in range(400)]
    difficulties = [3.0 if e else -1.0 for e in easy]
    wins = [1 / (1 + math.exp(-d)) for d in difficulties]
    lengths = [900 + i % 7 if e else 300 + i % 7 for i, e in enumerate(easy)]
    baselines = [500] * 400
    found = length_controlled_win_rate(wins, lengths, baselines, difficulties)
    assert found == pytest.approx(sum(wins) / 400, abs=0.02)
    assert length_controlled_win_rate(wins, lengths, baselines) < found - 0.05
    items = [
        {"question_id": str(i), "preference": w, "length": n, "baseline_length": 500}
        for i, (w, n) in enumerate(zip(wins, lengths, strict=True))
    ]
    by_id = {str(i): d for i, d in reversed(list(enumerate(difficulties)))}
    assert length_control(items, by_id) == found
    without = {"question_id": "x", "preference": None, "length": 1, "baseline_length": 1}
    assert length_control([without, *items], by_id) == found
    assert length_control(items[: FOLDS - 1], by_id) is None
