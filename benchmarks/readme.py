"""Write benchmarks/README.md from benchmarks/results; run it after results change.

python benchmarks/readme.py

Each file results/NAME_MACHINE.json is shown under the heading NAME. TABLES selects its columns; a
benchmark without an entry there is shown with all its plain values. Parts of a report of
benchmarks/gpu.sh are shown in the same way. `--gpu FILE` prints only the tables of such a report.
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
ORDER = [  # most important first; all others follow in alphabetical order
    *("quickstart", "step", "loss", "teacher", "plan", "scale", "cache", "data", "on_policy"),
    *("inheritance", "recovery", "recovery_slurm", "log_cost"),
]
UNITS = {"gib": 2**30, "mb": 1e6}  # used in place of a number format
HEAD = """\
# Benchmarks

`python benchmarks/readme.py` writes this page from the files of [results/](results); a test checks
that both agree. Compare numbers within one table: seconds of different tables were measured
under different load. `benchmarks/gpu.sh --set first` (`second`, `third`) runs what needs a GPU, in
nine minutes a set. For a machine without a network, run `python benchmarks/wheels.py --python 3.12`
on another machine first.
"""
SETS = ("first", "second", "third")  # of benchmarks/gpu.py
NO_GPU = "\nNothing has been measured on a GPU yet: results/gpu/first.json does not exist.\n"


@dataclass(frozen=True)
class Table:
    """How one benchmark's JSON becomes a table."""

    columns: dict[str, str]  # header: dotted path of the value in a row, ":" and its number format
    rows: str = ""  # dotted path of the rows; for a dict, its keys become the column `name`
    command: str = ""  # used where neither the file nor the script's docstring states the command
    note: str = ""


RECOVERY = {
    "SIGKILLs": "kills",
    "steps": "steps",
    "ends bit-equal": "equal",
    "failed starts": "failed_starts",
    "kills during a save": "left_a_save_half_written",
}
TABLES = {
    "quickstart": Table(
        {
            "model": "name",
            "text perplexity": "text_perplexity.mean:.2f",
            "chat perplexity": "chat_perplexity.mean:.2f",
            "+/-": "chat_perplexity.deviation:.2f",
            "KL to teacher": "forward_kl.mean:.3f",
            "top-1 agreement": "top1_agreement.mean:.1%",
            "start's KL removed": "kl_removed.mean:.1%",
        },
        "settings.*.metrics",
    ),
    "step": Table(
        {
            "case": "name",
            "target tokens per step": "target_tokens_a_step:.0f",
            "ours, target tokens/s": "ours_tokens_s:.1f",
            "ours / TRL": "ours_over_trl:.2f",
            "ours / naive": "ours_over_naive:.2f",
            "planned MiB": "planned_mib:.0f",
            "peak MiB: ours": "ours_mib:.0f",
            "TRL": "trl_mib:.0f",
            "naive": "naive_mib:.0f",
            "share of the matmul peak": "matrix_peak_share:.0%",
        },
        command="OMP_NUM_THREADS=2 python benchmarks/step.py --steps 3 "
        "--json benchmarks/results/step_cpu.json",
        note="TRL is its GKDTrainer, and its SFTTrainer in the rows sft_*.",
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
            "ours / matmuls alone": "ours_over_limit:.2f",
            "peak MiB: ours": "ours_mib:.0f",
            "TRL": "trl_mib:.0f",
            "naive": "naive_mib:.0f",
        },
    ),
    "teacher": Table(
        {
            "format": "format",
            "ranks": "ranks",
            "checkpoint, MiB": "checkpoint_mib:.1f",
            "held per rank": "held_share:.1%",
            "read per rank": "read_share:.1%",
            "largest logit difference": "max_logit_difference:g",
        },
    ),
    "plan": Table(
        {
            "layout": "layout",
            "planned, MiB": "planned_mib:.0f",
            "measured, MiB": "measured_mib:.0f",
            "planned / measured": "ratio:.2f",
            "peak phase": "worst",
        },
    ),
    "plan_recipes": Table(
        {
            "plan": "name",
            "processes": "processes",
            "micro-batch": "rows",
            "accumulation": "accumulation",
            "GiB per GPU": "total:gib",
            "GiB available": "of:gib",
            "seconds per step (modelled)": "step_s:.2g",
        },
        "plans",
        note="Modelled from model configurations. None of these runs has been executed on a GPU. "
        "The file states the command of each row.",
    ),
    "scale": Table(
        {
            "layout": "layout",
            "ranks": "ranks",
            "MB sent per rank and step": "counted_bytes:mb",
            "formula / counted": "formula_over_counted:.3f",
            "rounds of the ring per step": "counted_rounds",
            "formula / counted rounds": "rounds_over_counted:.3f",
        },
        "counted",
        note="The formula applied to the recipes on 8, 64 and 1 024 GPUs: "
        "[scale.md](results/scale.md).",
    ),
    "cache": Table(
        {
            "ids kept": "top_k",
            "type": "dtype",
            "bytes per token": "bytes_a_token",
            "probability mass kept": "mass:.4f",
            "divergence: cached teacher": "cached:.4f",
            "live teacher": "live:.4f",
            "relative gradient error": "gradient:.1e",
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
            "second start, s": "again_s:.2f",
            "rows/s loaded": "load_rows_per_s:.0f",
        },
        "preparation",
        command="python benchmarks/data.py --quick --json benchmarks/results/data_cpu.json",
    ),
    "inheritance": Table(
        {
            "layers, training, budget": "name",
            "CPU seconds": "cpu_s:.1f",
            "perplexity": "perplexity.mean:.1f",
            "+/-": "perplexity.deviation:.1f",
            "KL to teacher": "forward_kl.mean:.3f",
            "top-1 agreement": "top1_agreement.mean:.1%",
        },
        "means",
        note="The machine was busy, which more than doubled the CPU seconds.",
    ),
    "recovery": Table(RECOVERY),
    "recovery_slurm": Table(
        RECOVERY | {"SLURM tracks processes by": "slurm"},
        command="python benchmarks/recovery.py --slurm true --kills 20 "
        "--json benchmarks/results/recovery_slurm.json",
    ),
    "log_cost": Table(
        {
            "with logging, s": "with_log_s:.2f",
            "without logging, s": "without_log_s:.2f",
            "with / without": "on_over_off:.4f",
            "share spent in log calls": "log_share:.2%",
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gpu",
        help="Print the tables of this report of benchmarks/gpu.sh instead of writing the page.",
    )
    settings = parser.parse_args()
    if settings.gpu:
        print("\n".join(gpu_tables(json.loads(Path(settings.gpu).read_text()))))
    else:
        README.write_text(page())


def page() -> str:
    sections = [HEAD]
    for name, files in sorted(by_benchmark().items(), key=lambda item: place_of(item[0])):
        summary, command = about(name)
        sections += [f"## {name}\n", *summary, *(section(name, file, command) for file in files)]
    sections.append("## On a GPU\n")
    reports = [file for name in SETS if (file := RESULTS / f"gpu/{name}.json").exists()]
    for report in reports:
        sections += gpu_sections(report.stem, json.loads(report.read_text()))
    if not reports:
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
    """The first paragraph and the command of the benchmark's docstring."""
    script = ROOT / f"benchmarks/{name}.py"
    if not script.exists():
        return [], ""
    summary, command, *_ = ast.get_docstring(ast.parse(script.read_text())).split("\n\n")
    return [summary + "\n"], command


def section(name: str, file: Path, command: str) -> str:
    data = json.loads(file.read_text())
    table = TABLES.get(name, Table({}))
    own = data.get("command") if isinstance(data, dict) else None
    command = (" ".join(own) if isinstance(own, list) else own) or table.command or command
    if command.startswith("benchmarks/") and ".py" in command:  # recorded as sys.argv
        command = f"python {command}"
    lines = [table.note, ""] if table.note else []
    lines += [f"    {command}", ""] if command else []
    facts = [*machine(data), f"[{file.name}](results/{file.name})"]
    where = commit(data, file)
    lines += [", ".join(facts + ([f"commit {where}"] if where else [])) + ".", ""]
    return "\n".join([*lines, *tables(name, data), ""])


def gpu_sections(name: str, report: dict) -> list[str]:
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    states = [
        {"part": part["name"], "state": part["state"], "seconds": round(part["seconds"])}
        for part in report["parts"]
    ]
    head = f"    benchmarks/gpu.sh --set {name}\n\n{facts}, commit {str(report['commit'])[:10]}.\n"
    return [head, "\n".join(markdown(across(states))), "", *gpu_tables(report)]


def gpu_tables(report: dict) -> list[str]:
    """The tables of every part that reported numbers."""
    return [
        "\n".join(
            [f"### {part['name']}, on the GPU", "", *tables(part["name"], part["metrics"]), ""]
        )
        for part in report["parts"]
        if part.get("metrics")
    ]


def machine(data: Any) -> list[str]:
    """Machine and versions, from the top of the file or from its first row."""
    first = data[0] if isinstance(data, list) and data else data
    found = first if isinstance(first, dict) else {}
    found = found | found.get("versions", {})
    facts = [(key, found[key]) for key in MACHINE if isinstance(found.get(key), str | int)]
    return [
        str(value) if key in ("machine", "device") else f"{key} {value}" for key, value in facts
    ]


def commit(data: Any, file: Path) -> str:
    """The commit that was measured; where the file does not state it, the commit of the file."""
    if isinstance(data, dict) and isinstance(data.get("commit"), str):
        return data["commit"][:10]
    call = ["git", "log", "-1", "--format=%h", "--", str(file)]
    done = subprocess.run(call, cwd=ROOT, text=True, capture_output=True)
    return done.stdout.strip()


def tables(name: str, data: Any) -> list[str]:
    table = TABLES.get(name) or TABLES.get(re.split(r"[ ,]", name)[0])  # e.g. "step, larger"
    if table:
        shown = known(table, data)
        if any(cell for column in shown.values() for cell in column):
            return markdown(shown)
    lines: list[str] = []
    for title, rows in plain(data):
        lines += ([f"{words(title)}:", ""] if title else []) + markdown(across(rows)) + [""]
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
    """(title, rows of scalar values) for every list of rows and every dict with scalars."""
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
    return {words(key): [written(row.get(key), "") for row in rows] for key in keys}


def words(key: str) -> str:
    return key.replace("_", " ")


def markdown(cells: dict[str, list[str]]) -> list[str]:
    cells = {header: column for header, column in cells.items() if any(column)}
    lines = ["| " + " | ".join(cells) + " |", "|" + "---|" * len(cells)]
    return lines + ["| " + " | ".join(row) + " |" for row in zip(*cells.values(), strict=True)]


if __name__ == "__main__":
    main()
