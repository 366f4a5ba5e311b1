"""Models, seeds and shares of the gap: the numbers of the report's first table."""

import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from kd.evaluation.report.comparison import ONE_SEED, best_first, value_of
from kd.evaluation.report.result_table import (
    METRICS,
    NOT_RUN,
    REFERENCE,
    Metric,
    Results,
    run_name,
    split_seed,
)
from kd.evaluation.report.statistics import Spread, overlap, spread

NO_GAP = "no gap"  # the teacher is not better than the start, so there is no gap to close
SHARES = {
    "kl_removed": Metric("start's KL removed", 1, higher_is_better=True, percent=True),
    "text_gap_closed": Metric("text gap closed", 1, higher_is_better=True, percent=True),
    "chat_gap_closed": Metric("chat gap closed", 1, higher_is_better=True, percent=True),
}
COLUMNS = METRICS | SHARES
COMPARED = ("forward_kl", "chat_perplexity", "text_perplexity")


def group_models(results: Results, runs: list[str], teacher: str, start: str) -> dict[str, dict]:
    """Return {model: {"role", "models": names with seeds, "seeds"}} of all models.

    Included are training runs without a result, and seeds that other models have.
    """
    names = dict.fromkeys([teacher, start, *sorted({file.name for file in results.files})])
    names |= dict.fromkeys(unmeasured(runs, results))
    names |= dict.fromkeys(missing_seeds(list(names)))
    groups: dict[str, dict] = {}
    for name in names:
        model, seed = split_seed(name)
        role = {teacher: "teacher", start: "start"}.get(name, "student")
        group = groups.setdefault(model, {"role": role, "models": [], "seeds": []})
        group["models"].append(name)
        group["seeds"].append(seed or None)
    return groups


def unmeasured(runs: list[str], results: Results) -> list[str]:
    """Return the names of training runs that no result belongs to, by name or by path."""
    files = results.of_kind("perplexity", "agreement")
    names = {file.name for file in files}
    paths = {Path(file.content["settings"]["model"]).resolve() for file in files}
    return [
        Path(r).name for r in runs if Path(r).name not in names and Path(r).resolve() not in paths
    ]


def missing_seeds(names: list[str]) -> list[str]:
    """Return the seeds that one model has and another lacks: its mean is over fewer."""
    parts = [split_seed(name) for name in names]
    seeds = sorted({seed for _, seed in parts if seed}, key=int)
    models = dict.fromkeys(model for model, seed in parts if seed)
    wanted = [run_name(model, seed) for model in models for seed in seeds]
    return [name for name in wanted if name not in names]


def overview(
    results: Results, measured: dict[str, dict], groups: dict[str, dict], teacher: str, start: str
) -> dict[str, dict]:
    """Return all numbers of perplexity and agreement: by seed, by model, by source; best, order."""
    values = values_by_seed(measured)
    models = {
        name: seed_metrics(name, values, teacher, start)
        for group in groups.values()
        for name in group["models"]
    }
    settings = {
        model: group
        | {
            "metrics": {
                key: combine([models[name][key] for name in group["models"]]) for key in COLUMNS
            }
        }
        for model, group in groups.items()
    }
    students = {name: group for name, group in settings.items() if group["role"] == "student"}
    orders = {key: measured.get(METRICS[key].label, {}) for key in COMPARED}
    return {
        "models": models,
        "settings": settings,
        "sources": by_source(results, groups),
        "best": {key: best_of(key, students) for key in COLUMNS},
        "order": {
            key: [model for model in best_first(METRICS[key], numbers) if model in students]
            for key, numbers in orders.items()
        },
    }


def values_by_seed(measured: dict[str, dict]) -> dict[tuple[str, str], float]:
    """Return {(metric, name with seed): value}."""
    return {
        (label, Path(file).stem): value
        for label, models in measured.items()
        for numbers in models.values()
        if isinstance(numbers, dict)
        for file, value in zip(numbers["files"], numbers["seeds"], strict=True)
    }


def seed_metrics(
    name: str, values: dict[tuple[str, str], float], teacher: str, start: str
) -> dict[str, float | str]:
    """Return {metric: value, NOT_RUN, REFERENCE or NO_GAP} of one seed of a model."""

    def value(model: str, key: str) -> float | str:
        return values.get((METRICS[key].label, model), NOT_RUN)

    found = {key: value(name, key) for key in METRICS}
    if name in (teacher, start):
        shares = dict.fromkeys(SHARES, REFERENCE)
    else:
        goals = {
            "kl_removed": ("forward_kl", 0.0),
            "text_gap_closed": ("text_perplexity", value(teacher, "text_perplexity")),
            "chat_gap_closed": ("chat_perplexity", value(teacher, "chat_perplexity")),
        }
        shares = {
            share: share_closed(*(nats(key, x) for x in (found[key], value(start, key), goal)))
            for share, (key, goal) in goals.items()
        }
    if name == teacher:
        for key in ("forward_kl", "top1_agreement"):
            found[key] = REFERENCE if found[key] == NOT_RUN else found[key]
    return found | shares


def nats(key: str, value: float | str) -> float | str:
    """Return the logarithm of a perplexity, and any other metric as it is.

    In perplexity itself a student at 17, of a start at 1948 and a teacher at 3.7, would have closed
    99 % of the gap; in nats it is 76 %.
    """
    return math.log(value) if METRICS[key].perplexity and value != NOT_RUN else value


def share_closed(value: float | str, start: float | str, goal: float | str) -> float | str:
    """Return (start - value) / (start - goal): 1 at the goal, negative if worse than the start."""
    if NOT_RUN in (value, start, goal):
        return NOT_RUN
    return (start - value) / (start - goal) if start > goal else NO_GAP


def combine(values: list[float | str]) -> dict[str, float | None] | str:
    """Return mean, deviation and number of the values, and the number `of` seeds; or the reason."""
    numbers = [value for value in values if not isinstance(value, str)]
    if not numbers:
        return values[0]
    return asdict(spread(numbers)) | {"of": len(values)}


def by_source(results: Results, groups: dict[str, dict]) -> dict[str, dict]:
    """Return {source: {model: {"perplexity", "forward_kl"}}}, combined over seeds."""
    perplexities = ("text_perplexity", "chat_perplexity")
    values = {
        "perplexity": source_values(results, METRICS["text_perplexity"], perplexities),
        "forward_kl": source_values(results, METRICS["forward_kl"], ("forward_kl",)),
    }
    sources = dict.fromkeys(source for found in values.values() for source, *_ in found)

    def combined(source: str, group: dict, key: str) -> dict | str:
        names = group["models"]
        cell = combine([values[key].get((source, *split_seed(n)), NOT_RUN) for n in names])
        by_definition = group["role"] == "teacher" and key == "forward_kl"
        return REFERENCE if by_definition and cell == NOT_RUN else cell

    return {
        source: {
            model: {key: combined(source, group, key) for key in values}
            for model, group in groups.items()
        }
        for source in sources
    }


def source_values(
    results: Results, metric: Metric, keys: tuple[str, ...]
) -> dict[tuple[str, str, str], float]:
    """Return {(source, model, seed): value} over the rows of these metrics."""
    table = results.table
    rows = table[table["metric"].isin([METRICS[key].label for key in keys])]
    sums: pd.DataFrame = rows.groupby(["source", "model", "seed"], sort=False)[
        ["value", "weight"]
    ].sum()
    return dict(zip(sums.index, value_of(metric, sums.to_numpy(float)).tolist(), strict=True))


def spreads(key: str, students: dict[str, dict]) -> dict[str, Spread]:
    """Return the spread over seeds of the students with this metric, the best mean first."""
    found = {
        name: Spread(cell["mean"], cell["deviation"], cell["n"])
        for name, group in students.items()
        if isinstance(cell := group["metrics"][key], dict)
    }
    sign = -1 if COLUMNS[key].higher_is_better else 1
    return dict(sorted(found.items(), key=lambda item: sign * item[1].mean))


def best_of(key: str, students: dict[str, dict]) -> dict[str, str | None]:
    """Return {"setting": the best student if its range overlaps no other's, "reason": if none}."""
    found = spreads(key, students)
    if len(found) < 2:
        return {"setting": None, "reason": "fewer than two students measured"}
    (first, top), *others = found.items()
    overlaps = {name: overlap(top, other) for name, other in others}
    if None in overlaps.values():
        return {"setting": None, "reason": "one seed: its spread is unknown"}
    if any(overlaps.values()):
        close = ", ".join(name for name, overlapping in overlaps.items() if overlapping)
        return {"setting": None, "reason": f"the ranges of {first} and {close} overlap"}
    return {"setting": first, "reason": None}


def seed_tests(comparison: dict[str, dict], summary: dict) -> list[dict]:
    """Return the tests between seeds of all pairs of students, for COMPARED.

    A pair that could be tested over items only has no p-value here.
    """
    keys = ("first", "second", "difference", "standard_error", "p_value", "p_holm", "note")
    tests = []
    for key in COMPARED:
        for pair in comparison.get(METRICS[key].label, {"pairs": []})["pairs"]:
            if {pair["first"], pair["second"]} <= set(summary["order"][key]):
                test = {"metric": key} | {k: pair[k] for k in keys if k in pair}
                if pair["unit"] == "items":
                    test |= {"p_value": None, "note": ONE_SEED}
                    test.pop("p_holm", None)
                tests.append(test | {"ranges_overlap": pair["ranges_overlap"]})
    return tests
