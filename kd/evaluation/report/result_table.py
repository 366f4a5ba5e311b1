"""One tidy table of all results: a row for each metric, model, seed and item.

An item is a held-out row, a document or a question. A metric of a model on any set of items is
sum(value) / sum(weight): a mean where the weights are 1, a mean per token where they are numbers of
tokens. Models are named MODEL-seed0, MODEL-seed1, ...; a model without seeds has the seed "".
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kd.run.finished import read_json

COLUMNS = ["metric", "model", "seed", "source", "item", "value", "weight"]
NOT_RUN = "not run"
REFERENCE = "reference"  # true by definition: the start closes 0 % of the gap
# Settings that must be equal for all results of a metric.
COMPARABLE = (
    *("rows_hash", "max_length", "control_tokens_in_text", "teacher_files_hash", "rolling"),
    *("task_files_hash", "num_fewshot", "limit", "apply_chat_template"),
    *("questions_hash", "references_hash", "prompts_hash", "judge", "baseline", "verdict"),
    "orders",
)
PATTERNS = (
    "perplexity/*.json",
    "agreement/*.json",
    "benchmarks/*/*.json",
    "judge/*/results/*.json",
    "open_answers/*.json",
    "speed/*.json",
)


@dataclass(frozen=True)
class Metric:
    """What a metric is called and how its values are computed and shown."""

    label: str
    digits: int = 1
    higher_is_better: bool = False
    perplexity: bool = False  # exp of the mean
    percent: bool = False
    chance: float | None = None  # value of random guessing
    against_teacher: bool = True  # False for a metric that is itself a distance to the teacher
    baseline: str | None = None  # of a win rate: the model it is measured against
    tested: bool = True  # False if the same values are tested already in another unit


METRICS = {
    "text_perplexity": Metric("text perplexity", 2, perplexity=True),
    "chat_perplexity": Metric("chat perplexity", 2, perplexity=True),
    "bits_per_byte": Metric("bits per byte", 3, tested=False),  # text perplexity, in other units
    "forward_kl": Metric("KL to teacher", 4, against_teacher=False),
    "top1_agreement": Metric(
        "top-1 agreement", 1, higher_is_better=True, percent=True, against_teacher=False
    ),
}
Items = list[tuple[str, str, float, float]]  # (source, item, value, weight)


@dataclass(frozen=True)
class ResultFile:
    """One result file without its items."""

    kind: str  # the folder: perplexity, agreement, benchmarks, judge, open_answers, speed
    name: str  # the model's name with its seed
    path: str
    content: dict


@dataclass(frozen=True)
class Results:
    """Everything that the measurements left."""

    table: pd.DataFrame  # COLUMNS
    metrics: dict[str, Metric]  # by label
    files: list[ResultFile]
    sources: dict[tuple[str, str], str]  # (metric, name of the model): path of the file

    def models_with(self, metric: str) -> set[str]:
        """Return the models that have this metric."""
        return set(self.table.loc[self.table["metric"] == metric, "model"])

    def of_kind(self, *kinds: str) -> list[ResultFile]:
        """Return the files of these kinds."""
        return [file for file in self.files if file.kind in kinds]


def split_seed(name: str) -> tuple[str, str]:
    """Split a name: ("distill", "0") of "distill-seed0", ("teacher", "") of "teacher"."""
    match = re.fullmatch(r"(.+)-seed(\d+)", name)
    return (match[1], match[2]) if match else (name, "")


def run_name(model: str, seed: str) -> str:
    """Join a model and its seed again; the inverse of `split_seed`."""
    return f"{model}-seed{seed}" if seed else model


def read_results(folders: list[str]) -> Results:
    """Read all result files of these folders.

    Raises ValueError if there is no result, if a file is not a result, if a model is measured
    twice, or if two results of a metric were measured with different settings.
    """
    records: list[tuple] = []
    metrics: dict[str, Metric] = {}
    files: list[ResultFile] = []
    sources: dict[tuple[str, str], str] = {}
    settings: dict[str, dict[str, dict]] = {}
    for folder in folders:
        for pattern in PATTERNS:
            for path in sorted(Path(folder).glob(pattern)):
                content = read_json(path, "remove it and measure again")
                name, kind = path.stem, pattern.split("/")[0]
                for metric, items in read_items(kind, content, path):
                    label = metrics.setdefault(metric.label, metric).label
                    if (label, name) in sources:
                        raise ValueError(
                            f"{name}: {label} is in {sources[label, name]} and in {path}; give "
                            "every model a different name"
                        )
                    sources[label, name] = str(path)
                    settings.setdefault(label, {})[name] = content["settings"]
                    # A benchmark may hold a document twice; it counts once.
                    unique = {item[1]: item for item in items}.values()
                    records += [(label, *split_seed(name), *item) for item in unique]
                kept = {k: v for k, v in content.items() if k not in ("rows", "items", "tasks")}
                files.append(ResultFile(kind, name, str(path), kept))
    if not files:
        raise ValueError(
            f"results: no measurement in {', '.join(folders)}; run eval/perplexity.py, "
            "eval/agreement.py or another script of eval/ with this out_dir first"
        )
    for label, found in settings.items():
        check_comparable(label, found)
    check_same_model_files(files)
    return Results(pd.DataFrame(records, columns=COLUMNS), metrics, files, sources)


def read_items(kind: str, content: dict, path: Path) -> list[tuple[Metric, Items]]:
    """Return the metrics of a result file with their items.

    Raises ValueError, naming the field, if the file is not a result of this kind.
    """
    try:
        found = list(READERS[kind](content))
        for field in ("settings", "versions", "commit"):
            content[field]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: found no result of {kind} ({type(error).__name__}: {error}); wanted a file "
            "that a script of eval/ wrote; remove it and measure again"
        ) from error
    return found


def check_comparable(label: str, settings: dict[str, dict]) -> None:
    """Raise ValueError if two models were measured with different settings."""
    for key in COMPARABLE:
        found: dict[str, list[str]] = {}
        for name, of_model in settings.items():
            found.setdefault(str(of_model.get(key)), []).append(name)
        if len(found) > 1:
            groups = "; ".join(f"{value}: {', '.join(names)}" for value, names in found.items())
            raise ValueError(
                f"{label}: {key} differs ({groups}), so the results do not compare; measure all "
                "models with the same settings, or give each comparison its own out_dir"
            )


def check_same_model_files(files: list[ResultFile]) -> None:
    """Raise ValueError if a model's perplexity and agreement belong to different weights."""
    hashes: dict[str, set[str]] = {}
    for file in files:
        if file.kind in ("perplexity", "agreement"):
            settings = file.content["settings"]
            hashes.setdefault(file.name, set()).add(settings["model_files_hash"])
    for name, found in hashes.items():
        if len(found) > 1:
            raise ValueError(
                f"{name}: its perplexity and its agreement are of different model files, because "
                "it was trained or moved in between; measure it again"
            )


def read_perplexity(result: dict) -> Iterator[tuple[Metric, Items]]:
    """Yield the perplexities of text and chat rows, and the bits per byte of text rows."""
    for kind in ("text", "chat"):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        if rows:
            items = [(*row_key(row), row["nats"], row["tokens"]) for row in rows]
            yield METRICS[f"{kind}_perplexity"], items
        if rows and kind == "text":
            bits = [(*row_key(row), row["nats"] / math.log(2), row["bytes"]) for row in rows]
            yield METRICS["bits_per_byte"], bits


def read_agreement(result: dict) -> Iterator[tuple[Metric, Items]]:
    """Yield the KL divergence and the top-1 agreement of every row."""
    for key in ("forward_kl", "top1_agreement"):
        items = [(*row_key(row), row[key], row["tokens"]) for row in result["rows"]]
        if items:
            yield METRICS[key], items


def row_key(row: dict) -> tuple[str, str]:
    """Return source and item of a held-out row."""
    return row["source"], f"{row['source']} {row['index']}"


def read_benchmark(result: dict) -> Iterator[tuple[Metric, Items]]:
    """Yield every metric of every task of lm-evaluation-harness."""
    for task, found in result["tasks"].items():
        for name, values in found["items"]["values"].items():
            label = f"{task} {name.removesuffix(',none')}"
            chance = found["chance"] if name.startswith("acc") else None
            hashes = found["items"]["hashes"]
            items = [(task, id_, value, 1.0) for id_, value in zip(hashes, values, strict=True)]
            yield Metric(label, higher_is_better=True, percent=True, chance=chance), items


def read_judge(result: dict) -> Iterator[tuple[Metric, Items]]:
    """Yield the grades or the preferences of a judge; items without a verdict are left out."""
    settings = result["settings"]
    pair = settings["mode"] == "pair"
    key, label = ("preference", "win rate") if pair else ("score", "grade")
    items = [
        (item["category"], f"{item['question_id']} turn {item['turn']}", item[key], 1.0)
        for item in result["items"]
        if item[key] is not None
    ]
    if items:
        baseline = settings["baseline"] if pair else None
        label = f"{settings['benchmark']} {label}"
        yield Metric(label, higher_is_better=True, percent=pair, baseline=baseline), items


def read_open_answers(result: dict) -> Iterator[tuple[Metric, Items]]:
    """Yield the share of answers that contain the reference."""
    items = [("open answers", item["id"], float(item["match"]), 1.0) for item in result["items"]]
    yield Metric("open answers that match", higher_is_better=True, percent=True), items


READERS = {
    "perplexity": read_perplexity,
    "agreement": read_agreement,
    "benchmarks": read_benchmark,
    "judge": read_judge,
    "open_answers": read_open_answers,
    "speed": lambda result: (),  # speeds have no items
}
