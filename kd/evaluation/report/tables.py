"""The tables of a report, as lists of rows of text, and as plain text or Markdown."""

import math
from collections.abc import Callable, Iterable

from kd.evaluation.report.summary import METRICS


def number(value: float, metric: str, error: float | None = None) -> str:
    """With the metric's digits, or with so many more that one digit of `error` shows."""
    kind, scale = METRICS[metric], 100 if METRICS[metric].percent else 1
    digits = kind.digits
    if error:
        digits = min(max(digits, -math.floor(math.log10(scale * error))), 8)
    return f"{scale * value:.{digits}f}"


def cell(value: dict | str, metric: str, role: str = "student") -> str:
    """ "12.30 +/- 0.40 (n=3)", "12.30 (one seed)", or why there is no number."""
    if isinstance(value, str):
        return value
    unit = " %" if METRICS[metric].percent else ""
    mean, deviation = value["mean"], value["deviation"]
    missing = "" if value["n"] == value["of"] else f" of {value['of']}"
    if deviation is not None:
        both = f"{number(mean, metric, deviation)} +/- {number(deviation, metric, deviation)}"
        return f"{both}{unit} (n={value['n']}{missing})"
    seeds = f" (one seed{missing})" if role == "student" else ""
    return f"{number(mean, metric)}{unit}{seeds}"


def summary_rows(summary: dict, bold: Callable[[str], str] = str) -> list[list[str]]:
    """The header and a row a setting; `bold` marks a best that no other's range meets."""
    rows = [["model", *(metric.label for metric in METRICS.values())]]
    for name, group in summary["settings"].items():
        cells = [cell(group["metrics"][metric], metric, group["role"]) for metric in METRICS]
        marked = [
            bold(text) if summary["best"][metric]["setting"] == name else text
            for metric, text in zip(METRICS, cells, strict=True)
        ]
        rows.append([name, *marked])
    return rows


def plain_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Iterable[list[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source_rows(summary: dict) -> list[list[str]]:
    names = list(summary["settings"])
    rows = [["source", "figure", *names]]
    for source, settings in summary["sources"].items():
        for key, metric in (("perplexity", "chat_perplexity"), ("forward_kl", "forward_kl")):
            label = "perplexity" if key == "perplexity" else METRICS[metric].label
            cells = [
                cell(settings[name][key], metric, summary["settings"][name]["role"])
                for name in names
            ]
            rows.append([source, label, *cells])
    return rows
