"""Values with intervals, losses against the teacher, and tests of pairs, for every metric.

S seeds, I items, D bootstrap draws. Every number is computed once, from the tidy table.
"""

import hashlib
from dataclasses import asdict
from itertools import combinations

import numpy as np

from kd.evaluation.report.result_table import (
    NOT_RUN,
    REFERENCE,
    Metric,
    Results,
    run_name,
)
from kd.evaluation.report.statistics import (
    bootstrap,
    difference,
    holm,
    interval,
    overlap,
    ratios,
    sign_flip_test,
    spread,
)

ONE_SEED = "one seed: no test between seeds"


def measure(results: Results, models: list[str], teacher: str) -> dict[str, dict]:
    """Return {metric: {model: numbers, NOT_RUN or REFERENCE}} for all metrics and models."""
    return {
        label: {model: model_numbers(results, metric, model, teacher) for model in models}
        for label, metric in results.metrics.items()
    }


def compare(results: Results, measured: dict[str, dict], roles: dict[str, str]) -> dict[str, dict]:
    """Return {metric: its kind, the models' numbers and the tests of pairs}.

    `roles`: {model: teacher, start or student}. Students and start are compared pairwise.
    """
    return {
        label: {
            "higher_is_better": metric.higher_is_better,
            "percent": metric.percent,
            "chance": metric.chance,
            "baseline": metric.baseline,
            "settings": measured[label],
            "pairs": compare_pairs(results, metric, measured[label], roles),
        }
        for label, metric in results.metrics.items()
        if metric.tested
    }


def best_first(metric: Metric, numbers: dict[str, dict | str]) -> list[str]:
    """Return the measured models, the best mean first."""
    measured = [model for model, found in numbers.items() if isinstance(found, dict)]
    sign = -1 if metric.higher_is_better else 1
    return sorted(measured, key=lambda model: sign * numbers[model]["value"])


def compare_pairs(
    results: Results, metric: Metric, numbers: dict[str, dict | str], roles: dict[str, str]
) -> list[dict]:
    """Compare all pairs of students, and every student with the start, the better one first.

    Holm's correction is over the pairs of students, and apart from them over those with the start.
    """
    models = [model for model in best_first(metric, numbers) if roles[model] != "teacher"]
    pairs = [pair_numbers(results, metric, *pair) for pair in combinations(models, 2)]
    starts = {model for model, role in roles.items() if role == "start"}
    with_start = [pair for pair in pairs if starts & {pair["first"], pair["second"]}]
    among_students = [pair for pair in pairs if pair not in with_start]
    for family in (with_start, among_students):
        tested = [pair for pair in family if pair["p_value"] is not None]
        for pair, p in zip(tested, holm([pair["p_value"] for pair in tested]), strict=True):
            pair["p_holm"] = p
    for pair in among_students:
        if pair["unit"] == "items" and not pair["note"]:
            pair["note"] = ONE_SEED
    return pairs


def bootstrap_seed(label: str) -> int:
    """Return the seed of the bootstrap: the same report draws the same numbers."""
    return int(hashlib.sha256(label.encode()).hexdigest()[:8], 16)


def totals(results: Results, metric: str, models: list[str]) -> dict[str, np.ndarray]:
    """Return {model: (S, I, 2)}, values and weights of the items that all these models have."""
    table = results.table
    rows = table[(table["metric"] == metric) & table["model"].isin(models)]
    wide = rows.pivot(index="item", columns=["model", "seed"], values=["value", "weight"])
    wide = wide.loc[rows["item"].unique()].dropna()  # in the order of the files
    parts = [wide[part].T for part in ("value", "weight")]  # index: model, seed
    return {
        model: np.stack([part.xs(model, level="model").to_numpy(float) for part in parts], -1)
        for model in models
    }


def value_of(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """Return the metric of summed values and weights: (..., 2) to (...)."""
    mean = ratios(sums)
    return np.exp(mean) if metric.perplexity else mean


def evaluated(metric: Metric, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (S,) of arrays (I, 2) of all seeds, and their bootstrap values (D, S)."""
    values = np.array([value_of(metric, array.sum(0)) for array in arrays])
    draws = bootstrap(lambda sums: value_of(metric, sums), arrays, bootstrap_seed(metric.label))
    return values, draws


def model_numbers(results: Results, metric: Metric, model: str, teacher: str) -> dict | str:
    """Return a model's mean over its seeds with an interval, and its loss against the teacher."""
    measured = results.models_with(metric.label)
    if model not in measured:
        by_definition = model == teacher and not metric.against_teacher
        return REFERENCE if by_definition else NOT_RUN
    arrays = totals(results, metric.label, [model])[model]
    values, draws = evaluated(metric, list(arrays))
    numbers = {
        "value": float(values.mean()),
        **asdict(interval(values, draws)),
        "seeds": values.tolist(),
        "items": arrays.shape[1],
        "files": [results.sources[metric.label, name] for name in names_of(results, metric, model)],
    }
    if teacher in measured and teacher != model and metric.against_teacher:
        numbers["loss"] = loss(results, metric, model, teacher, 0.0)
        if metric.chance:
            numbers["loss_above_chance"] = loss(results, metric, model, teacher, metric.chance)
    return numbers


def names_of(results: Results, metric: Metric, model: str) -> list[str]:
    """Return the names with seeds of a model that have this metric, in the order of its seeds."""
    table = results.table
    rows = table[(table["metric"] == metric.label) & (table["model"] == model)]
    return [run_name(model, seed) for seed in sorted(rows["seed"].unique())]


def loss(results: Results, metric: Metric, model: str, teacher: str, chance: float) -> dict:
    """Return the relative loss of a model against its teacher, with an interval.

    Accuracy: (teacher - student) / (teacher - chance); perplexity: student / teacher - 1.
    """
    arrays = totals(results, metric.label, [teacher, model])

    def lost(values: np.ndarray) -> np.ndarray:
        best, sign = values[..., :1], 1 if metric.higher_is_better else -1
        with np.errstate(divide="ignore", invalid="ignore"):
            return sign * (best - values[..., 1:]) / (best - chance)

    found = evaluated(metric, [arrays[teacher][0], *arrays[model]])
    values, draws = (lost(part) for part in found)
    if not (np.isfinite(draws).all() and np.isfinite(values).all()):
        return {"value": None, "note": "the teacher is no better than chance"}
    return {"value": float(values.mean()), **asdict(interval(values, draws))}


def pair_numbers(results: Results, metric: Metric, first: str, second: str) -> dict:
    """Return first - second with an interval, and one test of the difference.

    Over seeds if both models have several: Welch's t-test. Otherwise over items: a paired
    permutation test of the means over seeds.
    """
    arrays = totals(results, metric.label, [first, second])
    ours, theirs = arrays[first], arrays[second]
    numbers = {"first": first, "second": second, "items": ours.shape[1]}
    if not ours.shape[1]:
        nothing = {"difference": None, "standard_error": None, "ranges_overlap": None}
        return numbers | nothing | {"p_value": None, "unit": "items", "note": "no item in common"}
    values, draws = evaluated(metric, [*ours, *theirs])
    a, b = values[: len(ours)].tolist(), values[len(ours) :].tolist()
    test = difference(a, b)
    numbers |= {
        "difference": float(np.mean(a) - np.mean(b)),
        **asdict(interval(values, draws, [len(ours), len(theirs)])),
        "standard_error": test.standard_error,
        "ranges_overlap": overlap(spread(a), spread(b)),
    }
    if min(len(a), len(b)) > 1:
        return numbers | {"p_value": test.p_value, "unit": "seeds", "note": test.note}
    means = ours.mean(0), theirs.mean(0)  # (I, 2)
    if not np.array_equal(means[0][:, 1], means[1][:, 1]):
        note = "the items have different numbers of tokens: no test"
        return numbers | {"p_value": None, "unit": "items", "note": note}
    p = sign_flip_test(means[0][:, 0], means[1][:, 0], bootstrap_seed(metric.label))
    return numbers | {"p_value": p, "unit": "items", "note": ""}
