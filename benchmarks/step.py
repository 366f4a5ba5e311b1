"""Complete training steps: ours, TRL's GKDTrainer or SFTTrainer, and a plain loop with full logits.

python benchmarks/step.py --quick --json benchmarks/results/step_cpu.json

All implementations train the same student from the same weights, with the same rows, batches,
precision and optimizer. Each runs in a new process, they alternate, and the fastest run of each
counts. For fine-tuning, TRL packs rows with its own algorithm; its GKDTrainer cannot pack, so in
distil_packed it takes the rows one by one. Target tokens per second count whole steps, from the
rows to the updated weights. Memory is the peak of the process (on a CPU: resident memory). The
losses of the first steps must agree. On a GPU, `planned_mib` is the memory plan of our run. TRL
1.16.0 is measured where it is installed (pip install --no-deps trl==1.16.0); otherwise its columns
are null. On a CPU the models have the depth and vocabulary of the real pair and a quarter of its
width; on a GPU they have the real shapes. Weights are random. The time breakdown is of our steps;
the operators are those of one more step under torch.profiler.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from step_cases import CPU_CASES, GPU_CASES, SHAPES, TINY_CASES, Case, make_inputs
from step_runs import measured
from step_watch import WARM_UP

from kd.recipe import parse, setting
from kd.run.run_record import commit

IMPLEMENTATIONS = ("ours", "trl", "naive")


@dataclass
class BenchmarkSettings:
    quick: bool = setting(False, "Measure only the first case, once: about 3 minutes on two cores.")
    cases: list[str] = setting(
        [],
        "Cases to measure; rows of other cases stay in the file. Choices by device: "
        + ", ".join(case.name for case in [*CPU_CASES, *GPU_CASES, *TINY_CASES]),
    )
    steps: int = setting(4, "Steps per process; the first one is not timed.")
    turns: int = setting(2, "Runs of each implementation.")
    implementations: list[str] = setting(
        list(IMPLEMENTATIONS), f"Some of {', '.join(IMPLEMENTATIONS)}; ours is always measured."
    )
    label: str = setting(
        "", "Suffix of the case names, e.g. to mark a measurement before a change."
    )
    json: str | None = setting(None, "Output file.")
    worker: str | None = setting(None, "Internal: the measurement of one process, as JSON.")

    def __post_init__(self) -> None:
        if self.steps <= WARM_UP:
            raise ValueError(
                f"steps: {self.steps}; wanted {WARM_UP + 1} or more, because one is not timed"
            )


def main() -> None:
    (settings,) = parse(BenchmarkSettings, description=__doc__)
    if settings.worker:
        work = json.loads(settings.worker)
        print(json.dumps(measured(Case(**work.pop("case")), **work)))
        return
    for case in chosen_cases(settings):
        turns = 1 if settings.quick else settings.turns
        row = measure(case, settings.steps, turns, settings.implementations)
        row["name"] += settings.label
        print_row(row)
        if settings.json:
            write_row(Path(settings.json), row)


def chosen_cases(settings: BenchmarkSettings) -> list[Case]:
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    if not settings.cases:
        return cases[:1] if settings.quick else cases
    known = {case.name: case for case in [*cases, *TINY_CASES]}
    for name in settings.cases:
        if name not in known:
            raise ValueError(f"cases: {name}; wanted some of {', '.join(known)}")
    return [known[name] for name in settings.cases]


def measure(case: Case, steps: int, turns: int, wanted: list[str]) -> dict[str, Any]:
    """One row: the fastest run of each implementation, and the time breakdown of our step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(case, folder, steps)
        found: dict[str, list[dict]] = {name: [] for name in IMPLEMENTATIONS}
        left_out = {"naive", "trl"} - set(wanted)
        not_run: dict[str, str] = dict.fromkeys(sorted(left_out), "not requested")
        if "trl" in wanted and importlib.util.find_spec("trl") is None:
            not_run["trl"] = "TRL is not installed"
        for _ in range(turns):
            for implementation in IMPLEMENTATIONS:
                if implementation in not_run:
                    continue
                result = in_process(case, implementation, folder, steps)
                if isinstance(result, str):
                    not_run[implementation] = result
                else:
                    found[implementation].append(result)
    assert found["ours"], not_run
    check_equal_steps(case, found)
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in found.items() if runs}
    peak = {name: max(run["peak_mib"] for run in runs) for name, runs in found.items() if runs}
    row = asdict(case) | {
        "accumulation": case.accumulation,
        "vocabulary": SHAPES[case.student][5],
        "timed_steps": steps - WARM_UP,
        "turns": turns,
        "target_tokens_a_step": best["ours"]["targets"] / (steps - WARM_UP),
        "positions_a_step": best["ours"]["positions"] / (steps - WARM_UP),
    }
    for name in IMPLEMENTATIONS:
        run = best.get(name)
        row[f"{name}_tokens_s"] = run and run["targets"] / run["seconds"]
        row[f"{name}_step_s"] = run and run["seconds"] / (steps - WARM_UP)
        row[f"{name}_mib"] = peak.get(name)
        row[f"{name}_losses"] = run and run["losses"]
    for name in ("trl", "naive"):
        other = row[f"{name}_tokens_s"]
        row[f"ours_over_{name}"] = other and row["ours_tokens_s"] / other
        row[f"{name}_mib_over_ours"] = row[f"{name}_mib"] and row[f"{name}_mib"] / row["ours_mib"]
    row |= {key: best["ours"][key] for key in ("matrix_peak_share", "break_down_s", "operators_s")}
    row["planned_mib"] = best["ours"].get("planned_mib")  # on a GPU only
    return row | {"not_run": not_run} | machine()


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": names[0] if names else None,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def in_process(case: Case, implementation: str, folder: Path, steps: int) -> dict | str:
    """The result of `measured` in a new process, or the reason why there is none."""
    work = {"implementation": implementation, "folder": str(folder), "steps": steps}
    work = json.dumps(work | {"case": asdict(case)})
    command = [sys.executable, __file__, "--worker", work]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    print(f"{case.name}: {implementation} ended with {done.returncode}: {last}", file=sys.stderr)
    return f"ended with {done.returncode}: {last}"


def check_equal_steps(case: Case, found: dict[str, list[dict]]) -> None:
    """Assert that all implementations took the same steps: targets and losses."""
    expected = found["ours"][0]
    for name, runs in found.items():
        if name == "trl" and case.teacher and case.packing:
            continue  # its batches hold other rows
        for run in runs:
            assert run["targets"] == expected["targets"], (name, run, expected)
            tolerance = 2e-2 if torch.cuda.is_available() else 1e-4
            for loss, own in zip(run["losses"], expected["losses"], strict=True):
                assert abs(loss - own) <= tolerance * abs(own), (name, run, expected)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Write a row into the file, replacing an earlier row of the same case."""
    rows = json.loads(path.read_text()) if path.exists() else []
    names = [earlier["name"] for earlier in rows]
    at = names.index(row["name"]) if row["name"] in names else len(rows)
    rows[at : at + 1] = [row]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def print_row(row: dict[str, Any]) -> None:
    def shown(value: float | None, digits: int = 2) -> str:
        return "not run" if value is None else f"{value:.{digits}f}"

    def each(key: str, digits: int) -> str:
        return ", ".join(
            f"{name} {shown(row[f'{name}_{key}'], digits)}" for name in IMPLEMENTATIONS
        )

    print(
        f"{row['name']}: target tokens/s {each('tokens_s', 0)}; ours / TRL "
        f"{shown(row['ours_over_trl'])}, ours / naive {shown(row['ours_over_naive'])}; "
        f"peak MiB {each('mib', 0)}; share of the matrix peak {row['matrix_peak_share']:.2f}\n"
        f"  time of our step: {parts(row['break_down_s'])}\n"
        f"  time by operator: {parts(row['operators_s'])}",
        flush=True,
    )


def parts(seconds: dict[str, float]) -> str:
    whole = sum(seconds.values())
    return ", ".join(f"{name} {value / whole:.0%}" for name, value in seconds.items())


if __name__ == "__main__":
    main()
