"""Every measurement's items: what each model scored on each row, document or question.

An item is a numerator and a denominator, so that a model's value on any set of items is sum / sum.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

# What must be equal for two results of a metric to stand in one table.
COMPARABLE = (
    *("rows_hash", "max_length", "teacher_files_hash", "rolling"),
    *("task_files_hash", "num_fewshot", "limit", "apply_chat_template"),
    *(
        "questions_hash",
        "references_hash",
        "prompts_hash",
        "judge",
        "baseline",
        "verdict",
        "orders",
    ),
)
PATTERNS = (
    "perplexity/*.json",
    "agreement/*.json",
    "benchmarks/*/*.json",
    "judge/*/results/*.json",
    "open_answers/*.json",
)


@dataclass
class Metric:
    """One figure of several models, on items."""

    label: str
    higher_is_better: bool
    perplexity: bool = False  # exp of the ratio
    percent: bool = False
    chance: float | None = None
    against_teacher: bool = True  # False: the figure is itself a distance to the teacher
    baseline: str | None = None  # of win rates: what they are won against
    models: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def read_metrics(folders: list[str]) -> tuple[dict[str, Metric], dict[str, dict]]:
    """({label: metric}, {file: its JSON}) of all results.

    Raises ValueError where a model is measured twice, or two were not measured alike.
    """
    metrics: dict[str, Metric] = {}
    files: dict[str, dict] = {}
    settings: dict[str, dict[str, dict]] = {}
    for folder in folders:
        for pattern in PATTERNS:
            for file in sorted(Path(folder).glob(pattern)):
                result = json.loads(file.read_text())
                files[str(file)] = result
                kind = pattern.split("/")[0]
                for metric, items in READERS[kind](result):
                    known = metrics.setdefault(metric.label, metric)
                    if file.stem in known.models:
                        raise ValueError(
                            f"{file.stem}: {metric.label} in {known.files[file.stem]} and in "
                            f"{file}; give every model a name of its own"
                        )
                    known.models[file.stem], known.files[file.stem] = items, str(file)
                    settings.setdefault(metric.label, {})[file.stem] = result["settings"]
    for label, found in settings.items():
        check_alike(label, found)
    return metrics, files


def check_alike(label: str, settings: dict[str, dict]) -> None:
    for key in COMPARABLE:
        found: dict[str, list[str]] = {}
        for name, of_model in settings.items():
            found.setdefault(str(of_model.get(key)), []).append(name)
        if len(found) > 1:
            groups = "; ".join(f"{value}: {', '.join(names)}" for value, names in found.items())
            raise ValueError(
                f"{label}: {key} differs ({groups}), so the figures cannot stand in one table; "
                "measure all models alike, or give each comparison an out_dir of its own"
            )


def of_perplexity(result: dict):
    for kind in ("text", "chat"):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        if rows:
            items = {f"{r['source']} {r['index']}": (r["nats"], r["tokens"]) for r in rows}
            yield Metric(f"{kind} perplexity", False, perplexity=True), items


def of_agreement(result: dict):
    rows = {f"{row['source']} {row['index']}": row for row in result["rows"]}
    for key, label, higher in (
        ("forward_kl", "KL to teacher", False),
        ("top1_agreement", "top-1 agreement", True),
    ):
        items = {name: (row[key], row["tokens"]) for name, row in rows.items()}
        if items:
            yield Metric(label, higher, percent=higher, against_teacher=False), items


def of_benchmark(result: dict):
    for task, found in result["tasks"].items():
        for name, values in found["items"]["values"].items():
            label = f"{task} {name.removesuffix(',none')}"
            chance = found["chance"] if name.startswith("acc") else None
            items = zip(found["items"]["hashes"], values, strict=True)
            metric = Metric(label, True, percent=True, chance=chance)
            yield metric, {id_: (value, 1.0) for id_, value in items}


def of_judge(result: dict):
    benchmark = result["settings"]["benchmark"]
    pair = result["settings"]["mode"] == "pair"
    key, label = ("preference", "win rate") if pair else ("score", "grade")
    items = {
        f"{item['question_id']} turn {item['turn']}": (item[key], 1.0)
        for item in result["items"]
        if item[key] is not None
    }
    if items:
        baseline = result["settings"]["baseline"] if pair else None
        yield Metric(f"{benchmark} {label}", True, percent=pair, baseline=baseline), items


def of_open_answers(result: dict):
    items = {item["id"]: (float(item["match"]), 1.0) for item in result["items"]}
    yield Metric("open answers that match", True, percent=True), items


READERS = {
    "perplexity": of_perplexity,
    "agreement": of_agreement,
    "benchmarks": of_benchmark,
    "judge": of_judge,
    "open_answers": of_open_answers,
}
