"""The report as Markdown: a verdict, one table and one plot; everything else is folded below."""

import json
from pathlib import Path

from kd.evaluation.report.findings import verdict, what_the_numbers_say
from kd.evaluation.report.overview import COLUMNS
from kd.evaluation.report.plots import BARS_FILE, CURVES_FILE, TRADE_OFF_FILE
from kd.evaluation.report.result_table import NOT_RUN, REFERENCE, Results
from kd.evaluation.report.sections import (
    ITEMS_EXPLAINED,
    PAIRS_EXPLAINED,
    item_rows,
    judge_sections,
    open_answers_note,
    origin,
    pair_rows,
    sample_rows,
    speed_rows,
    warnings,
)
from kd.evaluation.report.tables import first_rows, markdown_table, source_rows

CAPTION = """\
Mean +/- standard deviation over the n seeds of a model. Bold: the best student, if its range (mean
+/- deviation) overlaps no other's."""
EXPLANATIONS = f"""\
- Perplexity: exp of the mean negative log-likelihood of the held-out target tokens. Targets are all
  but the first token of a text, and the assistant's tokens of a chat.
- Bits per byte: over the text rows, per byte of their targets.
- KL to teacher: KL(teacher || student) in nats per target token, over all sources.
- Top-1 agreement: share of target tokens at which both models have the same most likely token.
- Start's KL removed: 1 - KL / KL of the start.
- Gap closed: (start - student) / (start - teacher) in nats per token, that is in the logarithm of
  perplexity; negative if worse than the start.
- "{NOT_RUN}": not measured. "{REFERENCE}": true by definition."""


def what_is_not_bold(summary: dict) -> str:
    """Say in which columns no student is bold, and why."""
    reasons: dict[str, list[str]] = {}
    for key, best in summary["best"].items():
        if best["setting"] is None:
            reasons.setdefault(best["reason"], []).append(COLUMNS[key].label)
    if not reasons:
        return ""
    listed = "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items())
    return f"No best is marked for: {listed}."


def read_samples(file: str | None) -> list[dict]:
    """Read rows {"prompt", "answers": {name: text}}; none without a file.

    Raises ValueError that names the line of a malformed row.
    """
    rows = []
    for i, line in enumerate(Path(file).read_text().splitlines() if file else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {i}: not JSON: {error}") from error
        if not isinstance(row, dict) or "prompt" not in row or "answers" not in row:
            raise ValueError(f"{file}, line {i}: wanted the fields prompt and answers")
        rows.append(row)
    return rows


def folded(title: str, *parts: str) -> str:
    """Return a section that unfolds on a click."""
    body = "\n\n".join(part for part in parts if part)
    return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"


def render(
    results: Results,
    summary: dict,
    comparison: dict[str, dict],
    expected: list[str],
    samples: list[dict],
    drawn: set[str],
    histories: dict[str, Path | None],
) -> str:
    """Return the text of report.md; `drawn` are the PNG files next to it."""

    def plot(file: str) -> str:
        return f"![{Path(file).stem.replace('_', ' ')}]({file})" if file in drawn else NOT_RUN

    def table(rows: list[list[str]]) -> str:
        return markdown_table(rows) if len(rows) > 1 else NOT_RUN

    speeds = results.of_kind("speed")
    names = [name for group in summary["settings"].values() for name in group["models"]]
    states = [
        f"Training curve of {run}: `{state}`" if state else f"Training curve of {run}: {NOT_RUN}"
        for run, state in histories.items()
    ]
    likelihoods = results.of_kind("perplexity", "agreement")
    first = first_rows(summary, comparison)
    sections = [
        "# Report",
        verdict(summary, comparison, expected),
        markdown_table(first) if len(first[0]) > 1 else NOT_RUN,
        CAPTION,
        *(f"Note: {text}." for text in warnings(likelihoods)),
        plot(BARS_FILE if BARS_FILE in drawn else TRADE_OFF_FILE),
        folded("How to read the table", EXPLANATIONS, what_is_not_bold(summary)),
        folded(
            "What the numbers say",
            what_the_numbers_say(summary, summary["pairs"], expected),
        ),
        folded("By source", table(source_rows(summary))),
        folded(
            "By item: intervals, and loss against the teacher",
            table(item_rows(comparison)),
            ITEMS_EXPLAINED,
            open_answers_note(results.of_kind("open_answers")),
        ),
        folded("Students against each other", table(pair_rows(comparison)), PAIRS_EXPLAINED),
        folded("Judged", judge_sections(results.of_kind("judge"))),
        folded(
            "Speed and size",
            markdown_table(speed_rows(speeds, names)) if speeds else NOT_RUN,
        ),
        folded("Quality against size and speed", plot(TRADE_OFF_FILE)),
        folded(
            "Training curves",
            "Lines: training. Points: held-out rows. Nats per token.",
            plot(CURVES_FILE),
            *states,
        ),
        folded("Sample answers", markdown_table(sample_rows(samples)) if samples else NOT_RUN),
        folded("Where the numbers come from", origin(results.files)),
    ]
    return "\n\n".join(sections) + "\n"


def report_json(
    results: Results,
    summary: dict,
    comparison: dict[str, dict],
    histories: dict[str, Path | None],
) -> dict[str, object]:
    """Return all numbers of the report, and the settings and versions of every result file."""
    curves = {run: str(state) if state else NOT_RUN for run, state in histories.items()}
    origins = {file.path: file.content for file in results.files}
    return summary | {"items": comparison, "curves": curves, "origin": origins}
