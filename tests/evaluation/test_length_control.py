"""The length-controlled win rate: alpaca_eval's numbers and general properties."""

import json
import math
from pathlib import Path

import pytest

from kd.evaluation.judge.judge_results import length_control
from kd.evaluation.judge.length_control import FOLDS, length_controlled_win_rate

CASES = json.loads(Path(__file__).with_name("length_control.json").read_text())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_equals_the_minimal_variant_of_alpaca_eval(case):
    """make_length_control.py computed the expected numbers with the package."""
    lengths, baselines, preferences = zip(*CASES[case]["judgements"], strict=True)
    found = length_controlled_win_rate(list(preferences), list(lengths), list(baselines))
    expected = CASES[case]["alpaca_eval"]
    assert 100 * found == pytest.approx(expected["length_controlled_winrate"], rel=1e-6)
    assert abs(found - expected["win_rate"] / 100) > 0.005  # length control has an effect


def test_a_model_that_wins_only_by_length_wins_half_at_equal_length():
    lengths = [100 + 10 * i for i in range(60)]
    baselines = [400] * 60
    wins = [1 / (1 + 2.718 ** (-(a - b) / 100)) for a, b in zip(lengths, baselines, strict=True)]
    more = [w for w in wins if w > 0.5]
    assert len(more) != 30
    assert length_controlled_win_rate(wins, lengths, baselines) == pytest.approx(0.5, abs=0.05)


def test_equal_lengths_do_not_change_the_win_rate():
    wins = [0.9, 0.2, 0.7, 0.6, 1.0, 0.5, 0.8, 0.4] * 20
    found = length_controlled_win_rate(wins, [50] * 160, [50] * 160)
    assert found == pytest.approx(sum(wins) / 160, abs=0.01)


def test_difficulty_is_not_mistaken_for_an_effect_of_length():
    """Preferences depend only on the instruction, and easy instructions get longer answers."""
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
