"""Sections of a report on items, judges and speed, as Markdown; the numbers come from elsewhere."""

from kd.evaluation.report.summary import NOT_RUN
from kd.evaluation.report.tables import markdown_table

ITEMS_EXPLAINED = """\
Value [95 % interval]. One seed: percentiles of 2000 bootstrap draws of the items (rows, documents,
questions). Several seeds: the variance over items and that between seeds together, with Student's t.
Lost against the teacher: accuracy (teacher - student) / (teacher - chance), perplexity
student / teacher - 1; its interval draws both models' items together."""
PAIRS_EXPLAINED = """\
Difference [95 % interval], first minus second, on the items that both have. p: two-sided; unit
"seeds": Welch's t-test between the seeds; unit "items": permutation of the signs of the items'
differences. Holm: corrected for the number of pairs of students in the same metric (pairs with the
start count apart). A difference is called shown where that is below 0.05."""


def shown(value: float | None, metric: dict, signed: bool = False) -> str:
    if value is None:
        return NOT_RUN
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if metric["percent"] else f"{value:{sign}.4g}"


def with_interval(numbers: dict, metric: dict, key: str = "value", signed: bool = False) -> str:
    low, high = (shown(numbers[side], metric, signed) for side in ("low", "high"))
    return f"{shown(numbers[key], metric, signed)} [{low}, {high}]"


def item_rows(comparison: dict[str, dict]) -> list[list[str]]:
    rows = [["metric", "model", "value", "lost against the teacher", "above chance", "n", "from"]]
    for label, metric in comparison.items():
        label += f" over {metric['baseline']}" if metric["baseline"] else ""
        for name, numbers in metric["settings"].items():
            if isinstance(numbers, str):  # why there is none
                rows.append([label, name, numbers, numbers, "", "", ""])
                continue
            count = f"{numbers['items']} items" + (
                f" x {len(numbers['seeds'])} seeds" if len(numbers["seeds"]) > 1 else ""
            )
            losses = [
                loss_cell(numbers.get(key)) if key == "loss" or key in numbers else ""
                for key in ("loss", "loss_above_chance")
            ]
            files = "<br>".join(f"`{file}`" for file in numbers["files"])
            rows.append([label, name, with_interval(numbers, metric), *losses, count, files])
    return rows


def loss_cell(loss: dict | None) -> str:
    if loss is None:
        return ""
    if loss["value"] is None:
        return loss["note"]
    return with_interval(loss, {"percent": True}, signed=True)


def pair_rows(comparison: dict[str, dict]) -> list[list[str]]:
    rows = [["metric", "first", "second", "first - second", "p", "Holm", "unit", "says"]]
    for label, metric in comparison.items():
        for pair in metric["pairs"]:
            rows.append([label, pair["first"], pair["second"], *pair_cells(pair, metric)])
    return rows


def pair_cells(pair: dict, metric: dict) -> list[str]:
    if pair["difference"] is None:
        return ["", "", "", "", pair["note"]]
    told = with_interval(pair, metric, "difference", signed=True)
    if pair["p_value"] is None:
        return [told, "", "", pair["unit"], pair["note"]]
    return [
        told,
        f"{pair['p_value']:.2g}",
        f"{pair['p_holm']:.2g}",
        pair["unit"],
        verdict(pair, metric),
    ]


def verdict(pair: dict, metric: dict) -> str:
    if pair["p_holm"] >= 0.05:
        return "no difference shown"
    first_better = (pair["difference"] > 0) == metric["higher_is_better"]
    better, worse = (
        (pair["first"], pair["second"]) if first_better else (pair["second"], pair["first"])
    )
    return f"{better} is better than {worse}"


def judge_sections(files: dict[str, dict]) -> str:
    """A table a benchmark: grades by category and turn, or win rates by subset."""
    judged = {f: r for f, r in files.items() if "benchmark" in r["settings"]}
    if not judged:
        return NOT_RUN
    parts = []
    for benchmark in dict.fromkeys(r["settings"]["benchmark"] for r in judged.values()):
        found = {f: r for f, r in judged.items() if r["settings"]["benchmark"] == benchmark}
        settings = next(iter(found.values()))["settings"]
        pair = settings["mode"] == "pair"
        asked = f"win rate over {settings['baseline']}" if pair else "grade from 1 to 10"
        parts.append(f"### {benchmark}: {asked}, by {settings['judge']}")
        parts.append(markdown_table(subset_rows(found) if pair else grade_rows(found)))
    parts.append("Grades and win rates by other judges, or with other prompts, do not compare.")
    return "\n\n".join(parts)


def grade_rows(found: dict[str, dict]) -> list[list[str]]:
    turns = list(dict.fromkeys(t for r in found.values() for t in r["turns"]))
    rows = [["model", "category", *(f"turn {t}" for t in turns), "all", "without a grade", "from"]]
    for file, result in found.items():
        parts = {"all": result["overall"] | {"turns": result["turns"]}} | result["categories"]
        for name, part in parts.items():
            cells = [mean_cell(part["turns"].get(t), False) for t in turns]
            rows.append(
                [
                    *(model_of(file), name, *cells, mean_cell(part, False)),
                    *(str(part["without_verdict"]), f"`{file}`"),
                ]
            )
    return rows


def subset_rows(found: dict[str, dict]) -> list[list[str]]:
    subsets = list(dict.fromkeys(c for r in found.values() for c in r["categories"]))
    header = [
        "model",
        "all",
        "at equal length",
        *subsets,
        "ties",
        "consistent",
        "no verdict",
        "from",
    ]
    rows = [header]
    for file, result in found.items():
        controlled, same = result["length_controlled_win_rate"], result["consistency"]
        rows.append(
            [
                *(model_of(file), mean_cell(result["overall"], True)),
                NOT_RUN if controlled is None else f"{100 * controlled:.1f} %",
                *(mean_cell(result["categories"].get(subset), True) for subset in subsets),
                *(str(result["ties"]), NOT_RUN if same is None else f"{100 * same:.0f} %"),
                *(str(result["overall"]["without_verdict"]), f"`{file}`"),
            ]
        )
    return rows


def mean_cell(numbers: dict | None, percent: bool) -> str:
    """Mean and standard error over items."""
    if not numbers or numbers["mean"] is None:
        return NOT_RUN
    scale, unit = (100, " %") if percent else (1, "")
    error = numbers["standard_error"]
    told = f"{scale * numbers['mean']:.{1 if percent else 2}f}{unit}"
    return told if error is None else f"{told} (se {scale * error:.{1 if percent else 2}f})"


def speed_rows(speeds: dict[str, dict], names: list[str]) -> list[list[str]]:
    """A row a model and batch size; the file's own numbers."""
    header = ["model", "parameters", "bytes on disk", "rows", "prefill tokens/s"]
    rows = [[*header, "decoding tokens/s", "first token, ms", "peak memory, MiB", "from"]]
    found = {model_of(file): (file, result) for file, result in speeds.items()}
    for name in dict.fromkeys([*names, *found]):
        if name not in found:
            rows.append([name, NOT_RUN, *[""] * 7])
            continue
        file, result = found[name]
        for size, numbers in result["batch_sizes"].items():
            memory = numbers["peak_memory_bytes"]
            rows.append(
                [
                    *(name, f"{result['parameters']:,}"),
                    NOT_RUN if result["bytes_on_disk"] is None else f"{result['bytes_on_disk']:,}",
                    size,
                    f"{numbers['prefill_tokens_per_second']:.4g}",
                    f"{numbers['decoding_tokens_per_second']:.4g}",
                    f"{1000 * numbers['first_token_seconds']:.3g}",
                    NOT_RUN if memory is None else f"{memory / 2**20:.0f}",
                    f"`{file}`",
                ]
            )
    return rows


def model_of(file: str) -> str:
    return file.rsplit("/", 1)[-1].removesuffix(".json")


def answer_accuracy_note(files: dict[str, dict]) -> str:
    told = {r["settings"]["match"] for r in files.values() if "match" in r["settings"]}
    return "\n".join(f"Open answers: {text}" for text in sorted(told))
