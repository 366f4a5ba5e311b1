"""The report as Markdown: tables, findings, plots, sample answers, and each number's origin."""

import html
import json
import re
from pathlib import Path

from kd.evaluation.report.findings import what_the_numbers_say
from kd.evaluation.report.sections import (
    ITEMS_EXPLAINED,
    PAIRS_EXPLAINED,
    answer_accuracy_note,
    item_rows,
    judge_sections,
    pair_rows,
    speed_rows,
)
from kd.evaluation.report.summary import METRICS, NOT_RUN, REFERENCE
from kd.evaluation.report.tables import markdown_table, source_rows, summary_rows

KINDS = ("perplexity", "agreement", "benchmarks", "judge", "open_answers", "speed")
SHOWN_ANSWER = 300  # characters of an answer in the table
EXPLANATIONS = """\
Perplexity: exp of the mean negative log-likelihood of the held-out target tokens (of text all but
the first, of chat the assistant's). Bits per byte: over the text rows, bytes of their targets. KL
to teacher: KL(teacher || student), nats a target token, over all sources. Top-1 agreement: share of
target tokens where both models' most probable token is the same. Start's KL removed:
1 - KL / KL of the start. Gap closed: (start - student) / (start - teacher) in perplexity; negative:
worse than the start. Shown are mean +/- standard deviation over the n seeds of a setting."""


def what_is_not_bold(summary: dict) -> str:
    reasons: dict[str, list[str]] = {}
    for metric, best in summary["best"].items():
        if best["setting"] is None:
            reasons.setdefault(best["reason"], []).append(METRICS[metric].label)
    if not reasons:
        return "Bold: the best student, its range (mean +/- deviation) apart from all others'."
    told = "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items())
    return (
        "Bold: the best student where its range (mean +/- deviation) is apart from all others'. "
        f"No best is marked for: {told}."
    )


def read_samples(file: str) -> list[dict]:
    """Rows {"prompt", "answers": {name: text}}. Raises ValueError naming the line."""
    rows = []
    for i, line in enumerate(Path(file).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {i}: not JSON: {error}") from error
        if not isinstance(row, dict) or "prompt" not in row or "answers" not in row:
            raise ValueError(f"{file}, line {i}: wanted the fields prompt and answers")
        rows.append(row)
    return rows


def sample_rows(samples: list[dict]) -> list[list[str]]:
    names = list(dict.fromkeys(name for row in samples for name in row["answers"]))
    rows = [["prompt", *(["reference"] if "reference" in samples[0] else []), *names]]
    for row in samples:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        texts = [prompt, *([row.get("reference", "")] if "reference" in samples[0] else [])]
        texts += [row["answers"].get(name, NOT_RUN) for name in names]
        rows.append([as_cell(text) for text in texts])
    return rows


def as_cell(text: str) -> str:
    """Text as it is, cut, so that no character of it is taken as Markdown or as a column."""
    text = text if len(text) <= SHOWN_ANSWER else f"{text[:SHOWN_ANSWER]}..."
    text = re.sub(r"[|*_`\[\]~\\#]", lambda mark: f"&#{ord(mark[0])};", html.escape(text))
    return text.replace("\n", "<br>") or "(empty)"


def origin(files: dict[str, dict]) -> str:
    """Every file with its settings: what all files of a kind share once, the rest beside the file."""
    kinds: dict[str, dict[str, dict]] = {}
    for file, result in files.items():
        record = result["settings"] | {"versions": result["versions"], "commit": result["commit"]}
        kind = next(kind for kind in KINDS if f"/{kind}/" in file)
        kinds.setdefault(kind, {})[file] = record
    parts = []
    for kind in KINDS:
        records = kinds.get(kind)
        if not records:
            parts.append(f"{kind}: {NOT_RUN}")
            continue
        first = next(iter(records.values()))
        shared = {k: v for k, v in first.items() if all(r.get(k) == v for r in records.values())}
        rows = [["file", "its own settings"]]
        for file, record in records.items():
            own = {key: value for key, value in record.items() if key not in shared}
            rows.append([file, as_code(own)])
        parts.append(f"{kind}, the same for all files: {as_code(shared)}")
        parts.append(markdown_table(rows))
    return "\n\n".join(parts)


def as_code(settings: dict) -> str:
    return f"`{json.dumps(settings).replace('|', chr(92) + '|')}`"


def warnings(results: dict[str, dict[str, dict]]) -> list[str]:
    """What makes figures of one table less comparable than they look."""
    advice = {
        "vocabulary_hash": "the models' tokenizers differ: of the perplexities compare none, only "
        "bits per byte",
        "chat_template_hash": "the models' chat templates differ: so do the tokens before answers",
        "dtype": "the models were measured in different types",
        "device": "the models were measured on different devices",
        "attn_implementation": "the models were measured with different attention",
    }
    settings = [r["settings"] for part in results.values() for r in part.values()]
    return [
        text for key, text in advice.items() if len({str(found[key]) for found in settings}) > 1
    ]


def render(
    summary: dict,
    comparison: dict[str, dict],
    results: dict[str, dict[str, dict]],
    files: dict[str, dict],
    expected: list[str],
    samples: list[dict] | None,
    plots: dict[str, bool],
    histories: dict[str, Path | None],
) -> str:
    """report.md; `plots` tells which of the PNG files beside it were drawn."""

    def plot(file: str) -> str:
        return f"![{Path(file).stem.replace('_', ' ')}]({file})" if plots[file] else NOT_RUN

    bars, trade_off, curves = plots
    speeds = {file: r for file, r in files.items() if "/speed/" in file}
    missing = [
        f"Training curve of {name}: {NOT_RUN}" for name, state in histories.items() if state is None
    ]
    measured = [name for group in summary["settings"].values() for name in group["models"]]
    notes = [f"Note: {text}." for text in warnings(results)]
    sections = [
        "# Report",
        "## Models",
        markdown_table(summary_rows(summary, lambda text: f"**{text}**")),
        what_is_not_bold(summary),
        *notes,
        f'{EXPLANATIONS}\n"{NOT_RUN}": not measured. "{REFERENCE}": so by definition.',
        "## What the numbers say",
        what_the_numbers_say(summary, expected),
        "## By source",
        markdown_table(source_rows(summary)),
        "## By item: intervals, and what is lost against the teacher",
        markdown_table(item_rows(comparison)) if comparison else NOT_RUN,
        ITEMS_EXPLAINED,
        answer_accuracy_note(files),
        "## Students against each other",
        markdown_table(pair_rows(comparison)) if comparison else NOT_RUN,
        PAIRS_EXPLAINED,
        "## Judged",
        judge_sections(files),
        "## Speed and size",
        markdown_table(speed_rows(speeds, measured)) if speeds else NOT_RUN,
        "## Plots",
        plot(bars),
        "### Quality against size and speed",
        plot(trade_off),
        "### Training",
        "Lines: training. Points: held-out rows. Nats a target token.",
        plot(curves),
        *missing,
        "## Sample answers",
        markdown_table(sample_rows(samples)) if samples else NOT_RUN,
        "## Where the numbers come from",
        origin(files),
        *(f"Training curve of {run}: `{state}`" for run, state in histories.items() if state),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"
