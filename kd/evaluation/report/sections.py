"""Sections of the report on items, pairs, judges, speed, answers and origin, as Markdown."""

import html
import json
import re

from kd.evaluation.report.findings import pair_verdict
from kd.evaluation.report.result_table import NOT_RUN, READERS, ResultFile
from kd.evaluation.report.tables import markdown_table, shown, with_interval

SHOWN_ANSWER = 300  # characters of an answer in the table
ITEMS_EXPLAINED = """\
Value [95 % interval]. With one seed: percentiles of 2000 bootstrap draws of the items (rows,
documents, questions). With several seeds: Student's t over the variance of items and of seeds. Loss
against the teacher: accuracy (teacher - student) / (teacher - chance), perplexity
student / teacher - 1; the bootstrap draws the items of both models together."""
PAIRS_EXPLAINED = """\
First minus second [95 % interval], on the items that both have; the better model is first. p is
two-sided. Unit "seeds": Welch's t-test between seeds, with its standard error. Unit "items": paired
permutation test of the items, used if a model has only one seed. Holm: p corrected for the number
of pairs of students in this metric; pairs with the start are corrected separately. A difference is
significant if Holm's p is below 0.05."""


def item_rows(comparison: dict[str, dict]) -> list[list[str]]:
    """Return a header and a row for each metric and model."""
    rows = [["metric", "model", "value", "loss against the teacher", "above chance", "n", "from"]]
    for label, metric in comparison.items():
        label += f" over {metric['baseline']}" if metric["baseline"] else ""
        for name, numbers in metric["settings"].items():
            if isinstance(numbers, str):  # the reason why there is no number
                rows.append([label, name, numbers, numbers, "", "", ""])
                continue
            count = f"{numbers['items']} items" + (
                f" x {len(numbers['seeds'])} seeds" if len(numbers["seeds"]) > 1 else ""
            )
            losses = [loss_cell(numbers.get(key)) for key in ("loss", "loss_above_chance")]
            files = "<br>".join(f"`{file}`" for file in numbers["files"])
            value = with_interval(numbers, metric["percent"])
            rows.append([label, name, value, *losses, count, files])
    return rows


def loss_cell(loss: dict | None) -> str:
    """Format a loss against the teacher, or the reason why there is none."""
    if loss is None:
        return ""
    return loss["note"] if loss["value"] is None else with_interval(loss, True, signed=True)


def pair_rows(comparison: dict[str, dict]) -> list[list[str]]:
    """Return a header and a row for each metric and pair of models."""
    header = ["metric", "first", "second", "first - second", "standard error", "p", "Holm"]
    rows = [[*header, "unit", "result"]]
    for label, metric in comparison.items():
        for pair in metric["pairs"]:
            rows.append([label, pair["first"], pair["second"], *pair_cells(pair, metric)])
    return rows


def pair_cells(pair: dict, metric: dict) -> list[str]:
    """Format difference, standard error, p-values, unit and result of a pair."""
    if pair["difference"] is None:
        return ["", "", "", "", "", pair["note"]]
    error, tested = pair["standard_error"], pair["p_value"] is not None
    return [
        with_interval(pair, metric["percent"], "difference", signed=True),
        "" if error is None else shown(error, metric["percent"]),
        f"{pair['p_value']:.2g}" if tested else "",
        f"{pair['p_holm']:.2g}" if tested else "",
        pair["unit"],
        pair_verdict(pair, metric["higher_is_better"]),
    ]


def judge_sections(judged: list[ResultFile]) -> str:
    """Return a table for each benchmark: grades by category and turn, or win rates by subset."""
    if not judged:
        return NOT_RUN
    parts = []
    for benchmark in dict.fromkeys(file.content["settings"]["benchmark"] for file in judged):
        found = [file for file in judged if file.content["settings"]["benchmark"] == benchmark]
        settings = found[0].content["settings"]
        pair = settings["mode"] == "pair"
        asked = f"win rate over {settings['baseline']}" if pair else "grade from 1 to 10"
        parts.append(f"### {benchmark}: {asked}, by {settings['judge']}")
        parts.append(markdown_table(subset_rows(found) if pair else grade_rows(found)))
    parts.append("Grades and win rates of different judges or prompts do not compare.")
    return "\n\n".join(parts)


def grade_rows(files: list[ResultFile]) -> list[list[str]]:
    """Return a header, and the mean grades of every model by category and turn."""
    turns = list(dict.fromkeys(t for file in files for t in file.content["turns"]))
    rows = [["model", "category", *(f"turn {t}" for t in turns), "all", "without a grade", "from"]]
    for file in files:
        result = file.content
        parts = {"all": result["overall"] | {"turns": result["turns"]}} | result["categories"]
        for name, part in parts.items():
            cells = [mean_cell(part["turns"].get(t), False) for t in turns]
            missing = str(part["without_verdict"])
            rows.append([file.name, name, *cells, mean_cell(part, False), missing, as_path(file)])
    return rows


def subset_rows(files: list[ResultFile]) -> list[list[str]]:
    """Return a header, and the win rates of every model by subset."""
    subsets = list(dict.fromkeys(c for file in files for c in file.content["categories"]))
    header = ["model", "all", "at equal length", *subsets, "ties", "consistent", "no verdict"]
    rows = [[*header, "from"]]
    for file in files:
        result = file.content
        controlled, same = result["length_controlled_win_rate"], result["consistency"]
        rows.append(
            [
                *(file.name, mean_cell(result["overall"], True), shown(controlled, True)),
                *(mean_cell(result["categories"].get(subset), True) for subset in subsets),
                *(str(result["ties"]), NOT_RUN if same is None else f"{100 * same:.0f} %"),
                *(str(result["overall"]["without_verdict"]), as_path(file)),
            ]
        )
    return rows


def mean_cell(numbers: dict | None, percent: bool) -> str:
    """Format a mean with its standard error over items."""
    if not numbers or numbers["mean"] is None:
        return NOT_RUN
    scale, unit = (100, " %") if percent else (1, "")
    error = numbers["standard_error"]
    text = f"{scale * numbers['mean']:.{1 if percent else 2}f}{unit}"
    return text if error is None else f"{text} (se {scale * error:.{1 if percent else 2}f})"


def speed_rows(speeds: list[ResultFile], names: list[str]) -> list[list[str]]:
    """Return a header, and a row for each model and batch size."""
    header = ["model", "parameters", "bytes on disk", "rows", "prefill tokens/s"]
    rows = [[*header, "decoding tokens/s", "first token, ms", "peak memory, MiB", "from"]]
    found = {file.name: file for file in speeds}
    for name in dict.fromkeys([*names, *found]):
        if name not in found:
            rows.append([name, NOT_RUN, *[""] * 7])
            continue
        result = found[name].content
        on_disk = result["bytes_on_disk"]
        for size, numbers in result["batch_sizes"].items():
            memory = numbers["peak_memory_bytes"]
            rows.append(
                [
                    *(name, f"{result['parameters']:,}"),
                    *(NOT_RUN if on_disk is None else f"{on_disk:,}", size),
                    f"{numbers['prefill_tokens_per_second']:.4g}",
                    f"{numbers['decoding_tokens_per_second']:.4g}",
                    f"{1000 * numbers['first_token_seconds']:.3g}",
                    NOT_RUN if memory is None else f"{memory / 2**20:.0f}",
                    as_path(found[name]),
                ]
            )
    return rows


def as_path(file: ResultFile) -> str:
    """Format the path of a result file."""
    return f"`{file.path}`"


def open_answers_note(files: list[ResultFile]) -> str:
    """Say how open answers are matched with the reference."""
    methods = {file.content["settings"]["match"] for file in files}
    return "\n".join(f"Open answers: {method}" for method in sorted(methods))


def sample_rows(samples: list[dict]) -> list[list[str]]:
    """Return a header, and a row for each prompt with the answers of all models."""
    names = list(dict.fromkeys(name for row in samples for name in row["answers"]))
    referenced = ["reference"] if "reference" in samples[0] else []
    rows = [["prompt", *referenced, *names]]
    for row in samples:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        texts = [prompt, *(row.get(key, "") for key in referenced)]
        texts += [row["answers"].get(name, NOT_RUN) for name in names]
        rows.append([as_cell(text) for text in texts])
    return rows


def as_cell(text: str) -> str:
    """Truncate and escape a text, so that no character is read as Markdown or as a column."""
    text = text if len(text) <= SHOWN_ANSWER else f"{text[:SHOWN_ANSWER]}..."
    text = re.sub(r"[|*_`\[\]~\\#]", lambda mark: f"&#{ord(mark[0])};", html.escape(text))
    return text.replace("\n", "<br>") or "(empty)"


def origin(files: list[ResultFile]) -> str:
    """List every file with its settings; settings that all files of a kind share are shown once."""
    parts = []
    for kind in READERS:
        records = {
            file.path: file.content["settings"]
            | {"versions": file.content["versions"], "commit": file.content["commit"]}
            for file in files
            if file.kind == kind
        }
        if not records:
            parts.append(f"{kind}: {NOT_RUN}")
            continue
        first = next(iter(records.values()))
        shared = {k: v for k, v in first.items() if all(r.get(k) == v for r in records.values())}
        rows = [["file", "other settings"]]
        for path, record in records.items():
            rows.append([path, as_code({k: v for k, v in record.items() if k not in shared})])
        parts.append(f"{kind}, the same for all files: {as_code(shared)}")
        parts.append(markdown_table(rows))
    return "\n\n".join(parts)


def as_code(settings: dict) -> str:
    """Format settings as code inside a table."""
    return f"`{json.dumps(settings).replace('|', chr(92) + '|')}`"


def warnings(files: list[ResultFile]) -> list[str]:
    """Say what makes the numbers of the first table less comparable than they look."""
    advice = {
        "vocabulary_hash": "the tokenizers of the models differ, so only bits per byte compare, "
        "not perplexities",
        "chat_template_hash": "the chat templates of the models differ, and so do their prompts",
        "dtype": "the models were measured in different data types",
        "device": "the models were measured on different devices",
        "attn_implementation": "the models were measured with different attention implementations",
    }
    settings = [file.content["settings"] for file in files]
    return [
        text for key, text in advice.items() if len({str(found[key]) for found in settings}) > 1
    ]
