"""Each metric's numbers: values with intervals, what is lost against the teacher, tests of pairs.

Settings are NAME of NAME-seed0, NAME-seed1, ...; a model without seeds is a setting of its own.
"""

import hashlib
from dataclasses import asdict
from itertools import combinations

import numpy as np

from kd.evaluation.report.items import Metric
from kd.evaluation.report.statistics import (
    bootstrap,
    difference,
    holm,
    interval,
    ratios,
    sign_flip_test,
)
from kd.evaluation.report.summary import NOT_RUN, REFERENCE


def compare(metrics: dict[str, Metric], settings: dict[str, dict], teacher: str) -> dict[str, dict]:
    """{label: {"settings": {setting: numbers or NOT_RUN}, "pairs": [...]}} of all metrics."""
    return {label: compare_one(m, settings, teacher) for label, m in metrics.items()}


def compare_one(metric: Metric, settings: dict[str, dict], teacher: str) -> dict:
    found = {
        name: [m for m in group["models"] if m in metric.models] for name, group in settings.items()
    }
    students = [n for n, group in settings.items() if group["role"] != "teacher" and found[n]]
    numbers = {
        name: setting_numbers(metric, models, teacher if name != teacher else None)
        if models
        else NOT_RUN
        for name, models in found.items()
    }
    if not metric.against_teacher and numbers.get(teacher) == NOT_RUN:
        numbers[teacher] = REFERENCE
    pairs = [pair_numbers(metric, a, b, found[a], found[b]) for a, b in combinations(students, 2)]
    starts = {name for name, group in settings.items() if group["role"] == "start"}
    with_start = [pair for pair in pairs if starts & {pair["first"], pair["second"]}]
    for family in (with_start, [pair for pair in pairs if pair not in with_start]):
        tested = [pair for pair in family if pair["p_value"] is not None]
        for pair, p in zip(tested, holm([pair["p_value"] for pair in tested]), strict=True):
            pair["p_holm"] = p
    return {
        "higher_is_better": metric.higher_is_better,
        "percent": metric.percent,
        "chance": metric.chance,
        "baseline": metric.baseline,
        "settings": numbers,
        "pairs": pairs,
    }


def seed_of(label: str) -> int:
    """Of the bootstrap: the same report draws the same numbers."""
    return int(hashlib.sha256(label.encode()).hexdigest()[:8], 16)


def figures(metric: Metric, models: list[str]) -> list[np.ndarray]:
    """(n, 2) of every model, over the items that all of them have."""
    shared = set.intersection(*(set(metric.models[m]) for m in models))
    order = [item for item in metric.models[models[0]] if item in shared]
    return [np.array([metric.models[m][item] for item in order]).reshape(-1, 2) for m in models]


def value_of(metric: Metric, totals: np.ndarray) -> np.ndarray:
    found = ratios(totals)
    return np.exp(found) if metric.perplexity else found


def setting_numbers(metric: Metric, models: list[str], teacher: str | None) -> dict:
    """Mean over seeds with its interval; and what is lost against the teacher, where there is one."""
    own = figures(metric, models)
    values, drawn = measured(metric, own)
    numbers = {
        "value": float(values.mean()),
        **asdict(interval(values, drawn)),
        "seeds": values.tolist(),
        "items": len(own[0]),
        "files": [metric.files[m] for m in models],
    }
    if teacher in metric.models and metric.against_teacher:
        numbers["loss"] = loss(metric, models, teacher, 0.0)
        if metric.chance:
            numbers["loss_above_chance"] = loss(metric, models, teacher, metric.chance)
    return numbers


def measured(metric: Metric, models: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """((models,) values, (draws, models) bootstrap values over the items)."""
    values = np.array([value_of(metric, figures.sum(0)) for figures in models])
    return values, bootstrap(lambda totals: value_of(metric, totals), models, seed_of(metric.label))


def loss(metric: Metric, models: list[str], teacher: str, chance: float) -> dict:
    """Accuracy: (teacher - student) / (teacher - chance); perplexity: student / teacher - 1."""

    def lost(values: np.ndarray) -> np.ndarray:
        best, sign = values[..., :1], 1 if metric.higher_is_better else -1
        with np.errstate(divide="ignore", invalid="ignore"):
            return sign * (best - values[..., 1:]) / (best - chance)

    values, drawn = (lost(found) for found in measured(metric, figures(metric, [teacher, *models])))
    if not (np.isfinite(drawn).all() and np.isfinite(values).all()):
        return {"value": None, "note": "the teacher is no better than chance"}
    return {"value": float(values.mean()), **asdict(interval(values, drawn))}


def pair_numbers(
    metric: Metric, first: str, second: str, ours: list[str], theirs: list[str]
) -> dict:
    """first - second, its interval, and a p-value: over seeds where both have several."""
    together = figures(metric, [*ours, *theirs])
    numbers = {"first": first, "second": second, "items": len(together[0])}
    if not len(together[0]):
        return numbers | {"difference": None, "p_value": None, "note": "no item in common"}
    values, drawn = measured(metric, together)
    a, b = values[: len(ours)], values[len(ours) :]
    numbers |= {
        "difference": float(a.mean() - b.mean()),
        **asdict(interval(values, drawn, [len(ours), len(theirs)])),
    }
    if min(len(ours), len(theirs)) > 1:
        test = difference(a.tolist(), b.tolist())
        return numbers | {"p_value": test.p_value, "unit": "seeds", "note": test.note}
    sums = [np.mean(part, 0) for part in (together[: len(ours)], together[len(ours) :])]  # (n, 2)
    if not np.array_equal(sums[0][:, 1], sums[1][:, 1]):
        note = "the tokens of the items differ: no test"
        return numbers | {"p_value": None, "unit": "items", "note": note}
    p = sign_flip_test(sums[0][:, 0], sums[1][:, 0], seed_of(metric.label))
    return numbers | {"p_value": p, "unit": "items", "note": ""}
