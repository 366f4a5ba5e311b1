"""Numbers as text, and tables as plain text or Markdown."""

import math
from collections.abc import Callable, Iterable

from kd.evaluation.report.overview import COLUMNS
from kd.evaluation.report.result_table import NOT_RUN


def number(value: float, key: str, error: float | None = None) -> str:
    """Format with the metric's digits, or with more so that one digit of `error` shows."""
    metric, scale = COLUMNS[key], 100 if COLUMNS[key].percent else 1
    digits = metric.digits
    if error:
        digits = min(max(digits, -math.floor(math.log10(scale * error))), 8)
    return f"{scale * value:.{digits}f}"


def cell(value: dict | str, key: str, role: str = "student") -> str:
    """Format "12.30 +/- 0.40 (n=3)" or "12.30 (one seed)"; a string says why there is no number."""
    if isinstance(value, str):
        return value
    unit = " %" if COLUMNS[key].percent else ""
    mean, deviation = value["mean"], value["deviation"]
    missing = "" if value["n"] == value["of"] else f" of {value['of']}"
    if deviation is not None:
        both = f"{number(mean, key, deviation)} +/- {number(deviation, key, deviation)}"
        return f"{both}{unit} (n={value['n']}{missing})"
    seeds = f" (one seed{missing})" if role == "student" else ""
    return f"{number(mean, key)}{unit}{seeds}"


def shown(value: float | None, percent: bool, signed: bool = False) -> str:
    """Format a value of any metric; NOT_RUN for None."""
    if value is None:
        return NOT_RUN
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if percent else f"{value:{sign}.4g}"


def with_interval(numbers: dict, percent: bool, key: str = "value", signed: bool = False) -> str:
    """Format "value [low, high]"."""
    low, high = (shown(numbers[side], percent, signed) for side in ("low", "high"))
    return f"{shown(numbers[key], percent, signed)} [{low}, {high}]"


def summary_rows(summary: dict, bold: Callable[[str], str] = str) -> list[list[str]]:
    """Return a header and a row for each model; `bold` marks the best student of a column."""
    rows = [["model", *(metric.label for metric in COLUMNS.values())]]
    for name, group in summary["settings"].items():
        cells = [cell(group["metrics"][key], key, group["role"]) for key in COLUMNS]
        marked = [
            bold(text) if summary["best"][key]["setting"] == name else text
            for key, text in zip(COLUMNS, cells, strict=True)
        ]
        rows.append([name, *marked])
    return rows


def first_rows(summary: dict, comparison: dict[str, dict]) -> list[list[str]]:
    """Return the first table: the measured columns of `summary_rows`, and all other metrics.

    The best student is bold.
    """
    groups = summary["settings"]
    rows = summary_rows(summary, lambda text: f"**{text}**")
    kept = [0] + [
        i
        for i, key in enumerate(COLUMNS, 1)
        if any(isinstance(group["metrics"][key], dict) for group in groups.values())
    ]
    rows = [[row[i] for i in kept] for row in rows]
    known = {metric.label for metric in COLUMNS.values()}
    for label in (label for label in comparison if label not in known):
        metric = comparison[label]
        rows[0].append(label)
        for row, name in zip(rows[1:], groups, strict=True):
            numbers = metric["settings"][name]
            measured = isinstance(numbers, dict)
            row.append(shown(numbers["value"], metric["percent"]) if measured else numbers)
    return rows


def source_rows(summary: dict) -> list[list[str]]:
    """Return a header, and for each source a row of perplexities and one of divergences."""
    names = list(summary["settings"])
    rows = [["source", "metric", *names]]
    for source, models in summary["sources"].items():
        for key, column in (("perplexity", "chat_perplexity"), ("forward_kl", "forward_kl")):
            label = "perplexity" if key == "perplexity" else COLUMNS[column].label
            cells = [
                cell(models[name][key], column, summary["settings"][name]["role"]) for name in names
            ]
            rows.append([source, label, *cells])
    return rows


def plain_table(rows: list[list[str]]) -> str:
    """Align rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Iterable[list[str]]) -> str:
    """Format rows as a Markdown table; the first one is the header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
