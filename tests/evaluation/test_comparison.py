"""Items are paired by their names, and what is lost has the sign of its metric."""

import math

import pytest

from kd.evaluation.report.comparison import compare_one, loss, pair_numbers
from kd.evaluation.report.items import Metric


def metric(models: dict[str, list[float]], **kind) -> Metric:
    """Every model has its items in an order of its own."""
    items = {
        name: dict(sorted(((f"i{n}", (x, 1.0)) for n, x in enumerate(values)), reverse=place % 2))
        for place, (name, values) in enumerate(models.items())
    }
    return Metric("m", **kind, models=items, files=dict.fromkeys(models, "file"))


def test_models_are_compared_item_by_item_whatever_their_order():
    hard = [0.0, 0.9, 0.1, 0.8, 0.3, 0.5, 0.2, 0.7, 0.4, 0.6]
    found = pair_numbers(
        metric({"a": [x + 0.05 for x in hard], "b": hard}, higher_is_better=True),
        *("a", "b", ["a"], ["b"]),
    )
    assert found["difference"] == pytest.approx(0.05) and found["unit"] == "items"
    assert found["p_value"] == pytest.approx(2 / 2**10)  # better on each of ten
    assert found["low"] == pytest.approx(0.05) == found["high"]


def test_seeds_are_tested_only_where_both_have_several():
    values = [0.1, 0.5, 0.3, 0.8]
    models = {f"m{n}": [x + 0.01 * n * (k + 1) for k, x in enumerate(values)] for n in range(4)}
    several = metric(models, higher_is_better=True)
    for ours, theirs, unit in (
        (["m0", "m1"], ["m2", "m3"], "seeds"),
        (["m0"], ["m2", "m3"], "items"),
        (["m0", "m1"], ["m2"], "items"),
    ):
        assert pair_numbers(several, "x", "y", ours, theirs)["unit"] == unit


def test_what_is_lost_is_above_zero_where_the_student_is_worse():
    right = metric({"teacher": [1, 1, 1, 1, 0] * 20, "student": [1, 1, 1, 0, 0] * 20},
                   higher_is_better=True)  # fmt: skip
    assert loss(right, ["student"], "teacher", 0.0)["value"] == pytest.approx(0.2 / 0.8)
    assert loss(right, ["student"], "teacher", 0.3)["value"] == pytest.approx(0.2 / 0.5)
    assert loss(right, ["student"], "teacher", 0.8)["value"] is None
    nats = metric({"teacher": [1.0, 1.2] * 9, "student": [1.5, 1.3] * 9},
                  higher_is_better=False, perplexity=True)  # fmt: skip
    wanted = math.exp(1.4) / math.exp(1.1) - 1
    assert loss(nats, ["student"], "teacher", 0.0)["value"] == pytest.approx(wanted)


def test_p_values_are_corrected_among_students_and_among_pairs_with_the_start_apart():
    hard = [0.1 * n for n in range(10)]
    near = [x + 0.02 * (-1) ** n + 0.03 for n, x in enumerate(hard)]
    models = {"start": near, "a": [x + 0.05 for x in hard], "b": hard}
    roles = {"start": "start", "a": "student", "b": "student"}
    settings = {name: {"role": role, "models": [name]} for name, role in roles.items()}
    found = compare_one(metric(models, higher_is_better=True), settings, "teacher")["pairs"]
    pairs = {(pair["first"], pair["second"]): pair for pair in found}
    alone = pairs.pop(("a", "b"))
    assert alone["p_holm"] == alone["p_value"] < 0.01
    least, most = sorted(pair["p_value"] for pair in pairs.values())
    assert sorted(pair["p_holm"] for pair in pairs.values()) == [
        pytest.approx(2 * least),
        pytest.approx(max(2 * least, most)),
    ]
