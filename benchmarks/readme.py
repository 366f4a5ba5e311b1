"""benchmarks/README.md from benchmarks/results: run it after results have changed; a test asks for it.

python benchmarks/readme.py

A file results/NAME_MACHINE.json is shown under NAME, by TABLES where that knows it and else by all
its plain values, so that a new benchmark appears without a change here. Parts of a report of
benchmarks/gpu.sh are shown alike. `--gpu FILE` prints the tables of such a report instead.
"""

import argparse
import ast
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "benchmarks/results", ROOT / "benchmarks/README.md"
MACHINE = ("machine", "device", "cores", "threads", "torch", "deepspeed", "datasets", "cuda")
ORDER = [  # by what a reader asks for first; others follow in the order of their names
    *("quickstart", "step", "loss", "teacher", "plan", "scale", "cache", "data", "on_policy"),
    *("inheritance", "recovery", "log_cost"),
]
UNITS = {"gib": 2**30, "mb": 1e6}  # in place of a format
HEAD = """\
# Benchmarks

Every figure here is read from a file of [results/](results) by `python benchmarks/readme.py`, to be run after results have
changed; a test compares. Compare figures of one table, not seconds of two: the machine was not equally quiet. What needs
a GPU is run by one command, `benchmarks/gpu.sh` (for a machine without a network `python benchmarks/wheels.py` first).
"""
NO_GPU = "\nNo GPU has run these yet: there is no results/gpu/gpu.json.\n"


@dataclass(frozen=True)
class Table:
    columns: dict[
        str, str
    ]  # header: where it stands in a row, by dots; with a format after a colon
    rows: str = ""  # where the rows stand, by dots; of a dict its keys are `name`
    command: str = ""  # that wrote it, where neither the file says it nor the script's first lines
    note: str = ""


TABLES = {
    "quickstart": Table(
        {
            "model": "name",
            "text perplexity": "text_perplexity.mean:.2f",
            "chat perplexity": "chat_perplexity.mean:.2f",
            "+/-": "chat_perplexity.deviation:.2f",
            "KL to teacher": "forward_kl.mean:.3f",
            "agrees with teacher": "top1_agreement.mean:.1%",
            "start's KL removed": "kl_removed.mean:.1%",
        },
        "settings.*.metrics",
    ),
    "step": Table(
        {
            "case": "name",
            "target tokens a step": "target_tokens_a_step:.0f",
            "ours, of them a second": "ours_tokens_s:.1f",
            "ours / TRL": "ours_over_trl:.2f",
            "ours / naive": "ours_over_naive:.2f",
            "MiB: ours": "ours_mib:.0f",
            "TRL": "trl_mib:.0f",
            "naive": "naive_mib:.0f",
            "of the matrix rate": "matrix_peak_share:.0%",
        },
        command="OMP_NUM_THREADS=2 python benchmarks/step.py --steps 3 --json benchmarks/results/step_cpu.json",
        note="TRL's column is its GKDTrainer's, or for sft_ its SFTTrainer's.",
    ),
    "loss": Table(
        {
            "widths": "shape",
            "divergence": "divergence",
            "type": "dtype",
            "ours, s": "ours_s:.3g",
            "TRL / ours": "trl_over_ours:.2f",
            "Liger / ours": "liger_over_ours:.2f",
            "naive / ours": "naive_over_ours:.2f",
            "ours / products alone": "ours_over_limit:.2f",
            "MiB: ours": "ours_mib:.0f",
            "TRL": "trl_mib:.0f",
            "naive": "naive_mib:.0f",
        },
    ),
    "teacher": Table(
        {
            "format": "format",
            "ranks": "ranks",
            "checkpoint, MiB": "checkpoint_mib:.1f",
            "held by a rank": "held_share:.1%",
            "read by a rank": "read_share:.1%",
            "largest difference of a logit": "max_logit_difference:g",
        },
    ),
    "plan": Table(
        {
            "layout": "layout",
            "planned, MiB": "planned_mib:.0f",
            "measured, MiB": "measured_mib:.0f",
            "planned / measured": "ratio:.2f",
            "worst moment": "worst",
        },
    ),
    "plan_recipes": Table(
        {
            "plan": "name",
            "processes": "processes",
            "rows at a time": "rows",
            "accumulation": "accumulation",
            "GiB a GPU": "total:gib",
            "of": "of:gib",
            "seconds a step (modelled)": "step_s:.2g",
        },
        "plans",
        command="each plan's own, in its file",
        note="Modelled from configurations; nothing of it was run on a GPU.",
    ),
    "scale": Table(
        {
            "layout": "layout",
            "ranks": "ranks",
            "MB a rank sends in a step": "counted_bytes:mb",
            "formula / counted": "formula_over_counted:.3f",
        },
        "counted",
        note="What the formula says of the recipes on 8, 64 and 1 024 GPUs: [scale.md](results/scale.md).",
    ),
    "cache": Table(
        {
            "ids kept": "top_k",
            "type": "dtype",
            "bytes a token": "bytes_a_token",
            "mass of the ids": "mass:.4f",
            "divergence: cached": "cached:.4f",
            "live": "live:.4f",
            "error of the gradient": "gradient:.1e",
        },
        "rows",
    ),
    "data": Table(
        {
            "preparation": "name",
            "workers": "workers",
            "tokens": "tokens",
            "rows/s prepared": "prepare_rows_per_s:.0f",
            "CPU seconds": "prepare_cpu_s:.2f",
            "a second start, s": "again_s:.2f",
            "rows/s loaded": "load_rows_per_s:.0f",
        },
        "preparation",
        command="python benchmarks/data.py --rows 800 --repeats 1 --json benchmarks/results/data_cpu.json",
    ),
    "inheritance": Table(
        {
            "blocks, training, budget": "name",
            "CPU seconds": "cpu_s:.1f",
            "perplexity": "perplexity.mean:.1f",
            "+/-": "perplexity.deviation:.1f",
            "KL to teacher": "forward_kl.mean:.3f",
            "agrees with teacher": "top1_agreement.mean:.1%",
        },
        "means",
    ),
    "recovery": Table(
        {
            "kills -9": "kills",
            "steps": "steps",
            "ends bit-equal": "equal",
            "failed starts": "failed_starts",
            "in a half-written save": "left_a_save_half_written",
        },
    ),
    "log_cost": Table(
        {
            "with log, s": "with_log_s:.2f",
            "without": "without_log_s:.2f",
            "with / without": "on_over_off:.4f",
            "share inside the log calls": "log_share:.2%",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", help="print the tables of this report of benchmarks/gpu.sh")
    settings = parser.parse_args()
    if settings.gpu:
        print("\n".join(gpu_figures(json.loads(Path(settings.gpu).read_text()))))
    else:
        README.write_text(page())


def page() -> str:
    sections = [HEAD]
    for name, files in sorted(by_benchmark().items(), key=lambda item: place_of(item[0])):
        says, command = about(name)
        sections += [f"## {name}\n", *says, *(section(name, file, command) for file in files)]
    sections.append("## On a GPU\n")
    report = RESULTS / "gpu/gpu.json"
    if report.exists():
        sections += gpu_sections(json.loads(report.read_text()))
    else:
        sections.append(NO_GPU.lstrip())
    return "\n".join(sections)


def by_benchmark() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        name = file.stem if file.stem in TABLES else file.stem.rsplit("_", 1)[0]
        found.setdefault(name, []).append(file)
    return found


def place_of(name: str) -> tuple[int, str]:
    known = [i for i, first in enumerate(ORDER) if name == first or name.startswith(f"{first}_")]
    return (min(known, default=len(ORDER)), name)


def about(name: str) -> tuple[list[str], str]:
    """What the benchmark's own file says first: what it measures, and the command."""
    script = ROOT / f"benchmarks/{name}.py"
    if not script.exists():
        return [], ""
    says, command, *_ = ast.get_docstring(ast.parse(script.read_text())).split("\n\n")
    return [says + "\n"], command


def section(name: str, file: Path, command: str) -> str:
    data = json.loads(file.read_text())
    table = TABLES.get(name, Table({}))
    own = data.get("command") if isinstance(data, dict) else None
    command = (" ".join(own) if isinstance(own, list) else own) or table.command or command
    lines = [table.note, ""] if table.note else []
    lines += [f"    {command}", ""] if command else []
    facts = [*machine(data), f"[{file.name}](results/{file.name})"]
    where = commit(data, file)
    lines += [", ".join(facts + ([f"commit {where}"] if where else [])) + ".", ""]
    return "\n".join([*lines, *tables(name, data), ""])


def gpu_sections(report: dict) -> list[str]:
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    states = [
        {"part": part["name"], "state": part["state"], "seconds": round(part["seconds"])}
        for part in report["parts"]
    ]
    head = f"    benchmarks/gpu.sh\n\n{facts}, commit {str(report['commit'])[:10]}.\n"
    return [head, "\n".join(markdown(across(states))), "", *gpu_figures(report)]


def gpu_figures(report: dict) -> list[str]:
    """A table or more of every part that has left figures."""
    return [
        "\n".join(
            [f"### {part['name']}, on the GPU", "", *tables(part["name"], part["figures"]), ""]
        )
        for part in report["parts"]
        if part.get("figures")
    ]


def machine(data: Any) -> list[str]:
    """What is said of it at the top of the file, or in its first row."""
    first = data[0] if isinstance(data, list) and data else data
    found = first if isinstance(first, dict) else {}
    found = found | found.get("versions", {})
    said = [(key, found[key]) for key in MACHINE if isinstance(found.get(key), str | int)]
    return [str(value) if key in ("machine", "device") else f"{key} {value}" for key, value in said]


def commit(data: Any, file: Path) -> str:
    """The measured one where the file says it, else that of the file."""
    if isinstance(data, dict) and isinstance(data.get("commit"), str):
        return data["commit"][:10]
    call = ["git", "log", "-1", "--format=%h", "--", str(file)]
    done = subprocess.run(call, cwd=ROOT, text=True, capture_output=True)
    return done.stdout.strip()


def tables(name: str, data: Any) -> list[str]:
    table = TABLES.get(name) or TABLES.get(re.split(r"[ ,]", name)[0])  # a part: "step, larger"
    if table:
        shown = known(table, data)
        if any(cell for column in shown.values() for cell in column):
            return markdown(shown)
    lines: list[str] = []
    for title, rows in plain(data):
        lines += ([f"{title}:", ""] if title else []) + markdown(across(rows)) + [""]
    return lines


def known(table: Table, data: Any) -> dict[str, list[str]]:
    rows = list(rows_at(data, table.rows.split(".") if table.rows else []))
    cells = {}
    for header, where in table.columns.items():
        path, _, form = where.partition(":")
        cells[header] = [written(value_at(row, path), form) for row in rows]
    return cells


def rows_at(data: Any, path: list[str], name: str = "") -> Iterator[dict]:
    if path and path[0] == "*":
        for key, value in data.items():
            yield from rows_at(value, path[1:], key)
    elif path:
        yield from rows_at(data.get(path[0], {}), path[1:], name)
    elif isinstance(data, list):
        yield from (row for row in data if isinstance(row, dict))
    elif not name and data and all(isinstance(value, dict) for value in data.values()):
        yield from ({"name": key} | value for key, value in data.items())
    else:
        yield ({"name": name} if name else {}) | data


def value_at(row: Any, path: str) -> Any:
    for key in path.split("."):
        row = row.get(key) if isinstance(row, dict) else None
    return row


def written(value: Any, form: str) -> str:
    if value is None or isinstance(value, dict):
        return ""
    if form in UNITS:
        return f"{value / UNITS[form]:.1f}"
    if form:
        return format(value, form)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(data: Any, title: str = "") -> Iterator[tuple[str, list[dict]]]:
    """(title, rows of plain values) of every list of rows, and of every dict that has some."""
    if isinstance(data, list):
        rows = [
            {k: v for k, v in row.items() if not isinstance(v, dict | list)}
            for row in data
            if isinstance(row, dict)
        ]
        if rows:
            yield title, rows
    elif isinstance(data, dict):
        values = {k: v for k, v in data.items() if not isinstance(v, dict | list)}
        values = {k: v for k, v in values.items() if k not in (*MACHINE, "command", "commit")}
        if values:
            yield title, [values]
        for key, value in data.items():
            if isinstance(value, dict | list) and key not in ("versions", "machine", "settings"):
                yield from plain(value, f"{title}, {key}" if title else key)


def across(rows: list[dict]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for row in rows for key in row if key not in MACHINE)
    return {key: [written(row.get(key), "") for row in rows] for key in keys}


def markdown(cells: dict[str, list[str]]) -> list[str]:
    cells = {header: column for header, column in cells.items() if any(column)}
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    return lines + ["| " + " | ".join(row) + " |" for row in zip(*cells.values(), strict=True)]


if __name__ == "__main__":
    main()
