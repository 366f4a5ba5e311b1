"""Items are paired by name, and the sign of a loss follows from its metric."""

import math

import pandas as pd
import pytest

from kd.evaluation.report.comparison import compare_pairs, loss, model_numbers, pair_numbers
from kd.evaluation.report.result_table import COLUMNS, Metric, Results, split_seed


def made(models: dict[str, list[float]], **kind) -> tuple[Results, Metric]:
    """Results of one metric; every second model has its items in reverse order."""
    metric = Metric("m", **kind)
    rows = []
    for place, (name, values) in enumerate(models.items()):
        items = [("m", *split_seed(name), "s", f"i{n}", x, 1.0) for n, x in enumerate(values)]
        rows += items[:: -1 if place % 2 else 1]
    files = {("m", name): "file" for name in models}
    return Results(pd.DataFrame(rows, columns=COLUMNS), {"m": metric}, [], files), metric


def test_models_are_compared_item_by_item_in_any_order():
    hard = [0.0, 0.9, 0.1, 0.8, 0.3, 0.5, 0.2, 0.7, 0.4, 0.6]
    results = made({"a": [x + 0.05 for x in hard], "b": hard}, higher_is_better=True)
    found = pair_numbers(*results, "a", "b")
    assert found["difference"] == pytest.approx(0.05) and found["unit"] == "items"
    assert found["p_value"] == pytest.approx(2 / 2**10)  # better on each of ten
    assert found["low"] == pytest.approx(0.05) == found["high"]


def test_seeds_are_tested_only_if_both_models_have_several():
    values = [0.1, 0.5, 0.3, 0.8]
    scores = [[x + 0.01 * n * (k + 1) for k, x in enumerate(values)] for n in range(4)]
    for names, unit in (
        (["x-seed0", "x-seed1", "y-seed0", "y-seed1"], "seeds"),
        (["x-seed0", "y-seed0", "y-seed1"], "items"),
        (["x-seed0", "x-seed1", "y-seed0"], "items"),
    ):
        results = made(dict(zip(names, scores, strict=False)), higher_is_better=True)
        assert pair_numbers(*results, "x", "y")["unit"] == unit


def test_a_loss_is_positive_if_the_student_is_worse():
    right = made({"teacher": [1, 1, 1, 1, 0] * 20, "student": [1, 1, 1, 0, 0] * 20},
                 higher_is_better=True)  # fmt: skip
    assert loss(*right, "student", "teacher", 0.0)["value"] == pytest.approx(0.2 / 0.8)
    assert loss(*right, "student", "teacher", 0.3)["value"] == pytest.approx(0.2 / 0.5)
    assert loss(*right, "student", "teacher", 0.8)["value"] is None
    nats = made({"teacher": [1.0, 1.2] * 9, "student": [1.5, 1.3] * 9},
                higher_is_better=False, perplexity=True)  # fmt: skip
    wanted = math.exp(1.4) / math.exp(1.1) - 1
    assert loss(*nats, "student", "teacher", 0.0)["value"] == pytest.approx(wanted)


def test_p_values_are_corrected_among_students_and_separately_among_pairs_with_the_start():
    hard = [0.1 * n for n in range(10)]
    near = [x + 0.02 * (-1) ** n + 0.03 for n, x in enumerate(hard)]
    models = {"start": near, "a": [x + 0.05 for x in hard], "b": hard}
    roles = {"start": "start", "a": "student", "b": "student"}
    results, metric = made(models, higher_is_better=True)
    numbers = {name: model_numbers(results, metric, name, "teacher") for name in models}
    found = compare_pairs(results, metric, numbers, roles)
    pairs = {(pair["first"], pair["second"]): pair for pair in found}
    alone = pairs.pop(("a", "b"))
    assert alone["p_holm"] == alone["p_value"] < 0.01
    least, most = sorted(pair["p_value"] for pair in pairs.values())
    assert sorted(pair["p_holm"] for pair in pairs.values()) == [
        pytest.approx(2 * least),
        pytest.approx(max(2 * least, most)),
    ]
