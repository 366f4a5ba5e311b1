"""The numbers of a report, from the JSON files of the measurements. Nothing here draws or writes.

Models are named <setting>-seed<k>: their figures are averaged over the seeds. What was not measured
is "not run", never 0.
"""

import json
import re
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from kd.evaluation.report.statistics import Spread, difference, holm, overlap, spread

NOT_RUN = "not run"
REFERENCE = "reference"  # true by definition: the start closes 0 % of the gap
NO_GAP = "no gap"  # teacher not better than start, so no share of it can be told
MEASUREMENTS = ("perplexity", "agreement")
# What must be equal for two results to stand in one table.
COMPARABLE = ("rows_hash", "max_length", "teacher_files_hash")
COMPARED = ("forward_kl", "chat_perplexity", "text_perplexity")


@dataclass(frozen=True)
class Metric:
    label: str
    digits: int
    lower_is_better: bool = True
    percent: bool = False


METRICS = {
    "text_perplexity": Metric("text perplexity", 2),
    "chat_perplexity": Metric("chat perplexity", 2),
    "bits_per_byte": Metric("bits per byte", 3),
    "forward_kl": Metric("KL to teacher", 4),
    "top1_agreement": Metric("top-1 agreement", 1, False, True),
    "kl_removed": Metric("start's KL removed", 1, False, True),
    "text_gap_closed": Metric("text gap closed", 1, False, True),
    "chat_gap_closed": Metric("chat gap closed", 1, False, True),
}


def read_results(folders: list[str]) -> dict[str, dict[str, dict]]:
    """{measurement: {name: its JSON without the rows}}.

    Raises ValueError where there is none, or where results were not measured alike.
    """
    results: dict[str, dict[str, dict]] = {}
    for measurement in MEASUREMENTS:
        files = [
            f for folder in folders for f in sorted((Path(folder) / measurement).glob("*.json"))
        ]
        results[measurement] = {file.stem: json.loads(file.read_text()) for file in files}
        for result in results[measurement].values():
            result.pop("rows")  # the report needs the means alone
        check_comparable(measurement, results[measurement])
    for name in set(results["perplexity"]) & set(results["agreement"]):
        hashes = {results[m][name]["settings"]["model_files_hash"] for m in MEASUREMENTS}
        if len(hashes) > 1:
            raise ValueError(
                f"{name}: its perplexity and its agreement are of different model files; it was "
                "trained or moved in between: measure it again"
            )
    return results


def check_comparable(measurement: str, results: dict[str, dict]) -> None:
    for key in COMPARABLE:
        found: dict[str, list[str]] = {}
        for name, result in results.items():
            found.setdefault(str(result["settings"].get(key)), []).append(name)
        if len(found) > 1:
            groups = "; ".join(f"{value}: {', '.join(names)}" for value, names in found.items())
            raise ValueError(
                f"{measurement}: {key} differs ({groups}), so the figures cannot stand in one "
                "table; measure all models alike, or give each comparison an out_dir of its own"
            )


def split_seed(name: str) -> tuple[str, str | None]:
    """("distill", "0") of "distill-seed0"; ("teacher", None) of "teacher"."""
    match = re.fullmatch(r"(.+)-seed(\d+)", name)
    return (match[1], match[2]) if match else (name, None)


def look_up(result: dict | None, *keys: str) -> float | str:
    for key in keys:
        result = (result or {}).get(key)
    return NOT_RUN if result is None else result


def model_metrics(
    name: str, results: dict[str, dict[str, dict]], teacher: str, start: str
) -> dict[str, float | str]:
    """{metric: its value, NOT_RUN, REFERENCE or NO_GAP} of one model."""

    def measured(model: str) -> dict[str, float | str]:
        perplexity = results["perplexity"].get(model)
        agreement = results["agreement"].get(model)
        return {
            "text_perplexity": look_up(perplexity, "kinds", "text", "perplexity"),
            "chat_perplexity": look_up(perplexity, "kinds", "chat", "perplexity"),
            "bits_per_byte": look_up(perplexity, "overall", "bits_per_byte"),
            "forward_kl": look_up(agreement, "overall", "forward_kl"),
            "top1_agreement": look_up(agreement, "overall", "top1_agreement"),
        }

    own, first, best = measured(name), measured(start), measured(teacher)
    shares: dict[str, float | str] = {
        "kl_removed": share_closed(own["forward_kl"], first["forward_kl"], 0.0),
        "text_gap_closed": share_closed(
            own["text_perplexity"], first["text_perplexity"], best["text_perplexity"]
        ),
        "chat_gap_closed": share_closed(
            own["chat_perplexity"], first["chat_perplexity"], best["chat_perplexity"]
        ),
    }
    if name in (teacher, start):
        shares = dict.fromkeys(shares, REFERENCE)
    if name == teacher:
        for key in ("forward_kl", "top1_agreement"):
            own[key] = REFERENCE if own[key] == NOT_RUN else own[key]
    return own | shares


def share_closed(value: float | str, start: float | str, goal: float | str) -> float | str:
    """(start - value) / (start - goal): 1 at the goal, negative where it went away from it."""
    if NOT_RUN in (value, start, goal):
        return NOT_RUN
    return (start - value) / (start - goal) if start > goal else NO_GAP


def summarise(
    results: dict[str, dict[str, dict]],
    runs: list[str],
    teacher: str,
    start: str,
    others: list[str] | None = None,
) -> dict[str, dict]:
    """All numbers of perplexity and agreement: by model, by setting over its seeds, by pair.

    `others` are models that have other measurements.
    """
    measured = sorted(set(others or []).union(*results.values()))
    names = dict.fromkeys([teacher, start, *measured])
    names |= dict.fromkeys(unmeasured(runs, results))
    names |= dict.fromkeys(missing_seeds(list(names)))
    models = {name: model_metrics(name, results, teacher, start) for name in names}
    groups: dict[str, dict] = {}
    for name in models:
        setting, seed = split_seed(name)
        role = {teacher: "teacher", start: "start"}.get(name, "student")
        group = groups.setdefault(setting, {"role": role, "models": [], "seeds": []})
        group["models"].append(name)
        group["seeds"].append(seed)
    for group in groups.values():
        group["metrics"] = {
            metric: combine([models[name][metric] for name in group["models"]])
            for metric in METRICS
        }
    students = {name: group for name, group in groups.items() if group["role"] == "student"}
    return {
        "models": models,
        "settings": groups,
        "sources": by_source(groups, results),
        "best": {metric: best_of(metric, students) for metric in METRICS},
        "order": {metric: order_of(metric, students) for metric in COMPARED},
        "pairs": [pair for metric in COMPARED for pair in pairs(metric, students, models)],
    }


def pairs(metric: str, students: dict[str, dict], models: dict[str, dict]) -> list[dict]:
    """Of all students with this metric, best first; p-values also corrected for their number."""
    found = [
        pair(metric, *names, students, models)
        for names in combinations(order_of(metric, students), 2)
    ]
    tested = [pair for pair in found if pair["p_value"] is not None]
    for one, p in zip(tested, holm([pair["p_value"] for pair in tested]), strict=True):
        one["p_holm"] = p
    return found


def unmeasured(runs: list[str], results: dict[str, dict[str, dict]]) -> list[str]:
    """Training runs that no result is of, by name or by path."""
    found = [
        (name, r["settings"]["model"]) for part in results.values() for name, r in part.items()
    ]
    names = {name for name, _ in found}
    paths = {Path(path).resolve() for _, path in found}
    return [
        Path(r).name for r in runs if Path(r).name not in names and Path(r).resolve() not in paths
    ]


def missing_seeds(names: list[str]) -> list[str]:
    """Seeds that one setting has and another has not: its mean is over n of more."""
    parts = [split_seed(name) for name in names]
    seeds = sorted({seed for _, seed in parts if seed}, key=int)
    settings = dict.fromkeys(setting for setting, seed in parts if seed)
    wanted = [f"{setting}-seed{seed}" for setting in settings for seed in seeds]
    return [name for name in wanted if name not in names]


def combine(values: list[float | str]) -> dict[str, float | None] | str:
    """Mean, deviation and n of what was measured, and how many `of` there are; or why nothing."""
    numbers = [value for value in values if not isinstance(value, str)]
    if not numbers:
        return values[0]
    return asdict(spread(numbers)) | {"of": len(values)}


def by_source(groups: dict[str, dict], results: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """{source: {setting: {"perplexity": ..., "forward_kl": ...}}}, combined over seeds."""
    figures = (("perplexity", "perplexity"), ("agreement", "forward_kl"))
    sources = dict.fromkeys(
        source
        for part in results.values()
        for result in part.values()
        for source in result["sources"]
    )

    def combined(source: str, group: dict, part: str, key: str) -> dict | str:
        found = [results[part].get(name) for name in group["models"]]
        value = combine([look_up(result, "sources", source, key) for result in found])
        by_definition = group["role"] == "teacher" and part == "agreement"
        return REFERENCE if by_definition and value == NOT_RUN else value

    return {
        source: {
            setting: {key: combined(source, group, part, key) for part, key in figures}
            for setting, group in groups.items()
        }
        for source in sources
    }


def spreads(metric: str, students: dict[str, dict]) -> dict[str, Spread]:
    """Of the settings with this metric, the best mean first."""
    found = {
        name: Spread(cell["mean"], cell["deviation"], cell["n"])
        for name, group in students.items()
        if isinstance(cell := group["metrics"][metric], dict)
    }
    sign = 1 if METRICS[metric].lower_is_better else -1
    return dict(sorted(found.items(), key=lambda item: sign * item[1].mean))


def order_of(metric: str, students: dict[str, dict]) -> list[str]:
    return list(spreads(metric, students))


def best_of(metric: str, students: dict[str, dict]) -> dict[str, str | None]:
    """{"setting": the best whose range meets no other's, or None; "reason": why None}."""
    found = spreads(metric, students)
    if len(found) < 2:
        return {"setting": None, "reason": "fewer than two students measured"}
    (first, top), *others = found.items()
    meets = {name: overlap(top, other) for name, other in others}
    if None in meets.values():
        return {"setting": None, "reason": "one seed: its spread is not known"}
    if any(meets.values()):
        close = ", ".join(name for name, meet in meets.items() if meet)
        return {"setting": None, "reason": f"the ranges of {first} and {close} overlap"}
    return {"setting": first, "reason": None}


def pair(metric: str, first: str, second: str, students: dict, models: dict) -> dict[str, object]:
    """The difference first - second over the seeds that were measured."""
    values = [
        [models[m][metric] for m in students[name]["models"] if models[m][metric] != NOT_RUN]
        for name in (first, second)
    ]
    found = difference(*values)
    return {
        "metric": metric,
        "first": first,
        "second": second,
        "difference": found.value,
        "standard_error": found.standard_error,
        "p_value": found.p_value,
        "note": found.note,
        "ranges_overlap": overlap(*(spread(v) for v in values)),
    }
