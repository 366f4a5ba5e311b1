"""Which layers to inherit, and how to train them: experiment C in small, on one CPU core.

python benchmarks/inheritance.py --rows 300 --heldout 120 --json runs/inheritance.json

Students take half of the layers of the quickstart's teacher: the first layers, evenly spaced
layers, and layers chosen by measured influence. Each is trained on text and distilled with the
small recipes of experiment C, from every seed. The evenly spaced layers are also trained with
DistilBERT's three terms, and within the time that distillation takes: more steps on text, fewer
with three terms. A seed selects the rows and their order, which are the same for all students. Time
is the CPU time of one single-threaded process, so other work on the machine does not count.
Finished runs stay in --out_dir; run the command again to continue. The committed results cover 13
of the 27 runs: one seed for the measured layers, and no runs of equal time for them.
"""

import json
import math
import os
import platform
import runpy
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t
from tqdm import tqdm

import kd.training.run_training  # noqa: F401  runs are forked with the libraries already loaded
from kd.evaluation.report.statistics import difference, holm, spread
from kd.recipe import parse, setting
from kd.run.run_record import commit

PARENT, DATA = "data/quickstart/teacher", "runs/quickstart/data"
RECIPES = {"text": "c_text", "distill": "c_distill", "three terms": "c_distill_hidden"}
METRICS = ("perplexity", "forward_kl", "top1_agreement")


@dataclass
class InheritanceSettings:
    choices: list[str] = setting(
        ["even", "first", "angular", "perplexity"],
        "Choices of train/inherit.py; the first one is trained with every method.",
    )
    seeds: list[int] = setting([0, 1, 2], "Seeds of the rows and their order.")
    keep: int = setting(3, "Layers of a student; the parent has 6.")
    rows: int = setting(400, "Training rows, read once when token budgets are equal.")
    heldout: int = setting(150, "Held-out rows.")
    tokens: int = setting(10_000, "Training tokens on which influence is measured.")
    minutes: float = setting(math.inf, "Start no training after this many minutes.")
    out_dir: str = setting("runs/inheritance", "Folder of the students and their results.")
    json: str | None = setting(None, "Output file.")


@dataclass(frozen=True)
class Cell:
    choice: str
    method: str
    budget: str  # "tokens" or "time"
    seed: int

    @property
    def setting(self) -> str:
        return f"{self.choice}, {self.method}, equal {self.budget}"

    @property
    def name(self) -> str:
        return f"{self.choice}-{self.method.replace(' ', '_')}-{self.budget}-seed{self.seed}"


def main() -> None:
    (settings,) = parse(InheritanceSettings, description=__doc__)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started, out = time.monotonic(), Path(settings.out_dir)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    students = make_students(settings, out)
    wanted = cells(list(distinct(students)), settings.seeds)
    finished: dict[Cell, dict] = {}
    for cell in tqdm(wanted, desc="trainings"):
        done = out / cell.name / "cell.json"
        if not done.is_file() and (time.monotonic() - started) / 60 < settings.minutes:
            train(cell, settings, out, finished)
        if done.is_file():
            finished[cell] = json.loads(done.read_text())
    measure([*distinct(students), *(cell.name for cell in finished)], settings, out)
    report = summarise(settings, students, finished, out)
    show(report)
    if settings.json:
        Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")


def make_students(settings: InheritanceSettings, out: Path) -> dict[str, dict]:
    """{choice: done.json of train/inherit.py}."""
    for choice in settings.choices:
        flags = ["--parent", PARENT, "--keep", settings.keep, "--choice", choice]
        if choice not in ("even", "first", "last"):
            rows = [{"path": f"{DATA}/text_train.jsonl", "count": 500}]
            flags += ["--data", json.dumps(rows), "--tokens", settings.tokens]
        if not (out / choice / "done.json").is_file():
            run("train/inherit.py", *flags, "--output_dir", out / choice, log=out / "logs" / choice)
    return {c: json.loads((out / c / "done.json").read_text()) for c in settings.choices}


def distinct(students: dict[str, dict]) -> dict[str, list[int]]:
    """{choice: layers}, without choices whose layers an earlier choice has."""
    found: dict[str, list[int]] = {}
    for choice, done in students.items():
        if done["layers"] not in found.values():
            found[choice] = done["layers"]
    return found


def cells(choices: list[str], seeds: list[int]) -> list[Cell]:
    main, *others = choices
    grid = [(main, method, "tokens") for method in RECIPES]
    grid += [(choice, "text", "tokens") for choice in others]
    grid += [(main, method, "time") for method in RECIPES if method != "distill"]
    grid += [(choice, "distill", "tokens") for choice in others]
    return [Cell(*place, seed) for place in grid for seed in seeds]


def train(cell: Cell, settings: InheritanceSettings, out: Path, finished: dict) -> None:
    """Train one student with the small recipe and write its cell.json: steps, CPU seconds."""
    steps = None
    if cell.budget == "time":
        steps = steps_in_the_time_of_distillation(cell, settings, out, finished)
        if steps is None:
            return  # the runs that define the budget are not finished
    seconds = run_recipe(cell, settings, out, cell.name, steps)
    state = json.loads((out / cell.name / "trainer_state.json").read_text())
    record = {"steps": state["global_step"], "cpu_s": seconds}
    (out / cell.name / "cell.json").write_text(json.dumps(record))


def steps_in_the_time_of_distillation(
    cell: Cell, settings: InheritanceSettings, out: Path, finished: dict
) -> int | None:
    """Steps of equal time; the fixed cost of a run is measured with a run of one step."""
    own, theirs = (
        [finished.get(Cell(cell.choice, method, "tokens", seed)) for seed in settings.seeds]
        for method in (cell.method, "distill")
    )
    if None in own or None in theirs:
        return None
    file = out / f"one-step-{cell.method.replace(' ', '_')}.json"
    if not file.is_file():
        seconds = run_recipe(cell, settings, out, file.stem, 1)
        file.write_text(json.dumps(seconds))
    fixed = json.loads(file.read_text())
    of_all = statistics.median((r["cpu_s"] - fixed) / (r["steps"] - 1) for r in own)
    budget = statistics.median(r["cpu_s"] for r in theirs)
    return max(1, round(1 + (budget - fixed) / of_all))


def run_recipe(
    cell: Cell, settings: InheritanceSettings, out: Path, name: str, steps: int | None
) -> float:
    script, key = ("sft", "--model") if cell.method == "text" else ("distill", "--student")
    rows = [{"path": f"{DATA}/text_train.jsonl", "count": settings.rows}]
    flags = ["--config", f"recipes/small/{RECIPES[cell.method]}.yaml", key, out / cell.choice]
    flags += ["--data", json.dumps(rows), "--seed", cell.seed, "--mixture_seed", cell.seed]
    flags += ["--output_dir", out / name, "--save_strategy", "no", "--report_to", "none"]
    flags += ["--use_cpu", "true", "--precision", precision(), "--disable_tqdm", "true"]
    flags += ["--data_workers", 1]
    flags += ["--max_steps", steps] if steps else []
    return run(f"train/{script}.py", *flags, log=out / "logs" / name)


def precision() -> str:
    return "bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "float32"


def run(script: str, *flags, log: Path) -> float:
    """Run a script in a new process and return its CPU seconds; its output goes to LOG.log."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with open(f"{log}.log", "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = [script, *map(str, flags)]
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{script}: status {status}; look at {log}.log")
    return usage.ru_utime + usage.ru_stime


def measure(names: list[str], settings: InheritanceSettings, out: Path) -> None:
    rows = [{"path": f"{DATA}/text_heldout.jsonl", "count": settings.heldout}]
    flags = ["--teacher", PARENT, "--data", json.dumps(rows), "--max_length", 256]
    models = [f"{name}={out / name}" for name in names]
    log = out / "logs" / "agreement"
    run("eval/agreement.py", *flags, "--models", *models, "--out_dir", out / "results", log=log)


def summarise(
    settings: InheritanceSettings, students: dict, finished: dict[Cell, dict], out: Path
) -> dict[str, Any]:
    """The report: choices, runs, means with intervals, differences with tests."""
    runs = [
        asdict(cell) | {"setting": cell.setting} | record | metrics_of(cell.name, out)
        for cell, record in finished.items()
    ]
    by_setting: dict[str, list[dict]] = {}
    for found in runs:
        by_setting.setdefault(found["setting"], []).append(found)
    choices = {
        choice: done | metrics_of(same_blocks(choice, students), out)
        for choice, done in students.items()
    }
    teacher = json.loads((out / "results/perplexity/teacher.json").read_text())
    return {
        "command": sys.argv,
        "commit": commit(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one thread, {precision()}",
        "settings": asdict(settings) | {"minutes": None},
        "teacher_perplexity": teacher["overall"]["perplexity"],
        "choices": choices,
        "means": {name: means(found) for name, found in by_setting.items()},
        "differences": differences(by_setting),
        "runs": runs,
    }


def same_blocks(choice: str, students: dict) -> str:
    """The first choice with the same layers; it was measured instead."""
    return next(c for c, done in students.items() if done["layers"] == students[choice]["layers"])


def metrics_of(name: str, out: Path) -> dict[str, float]:
    means = json.loads((out / "results" / "agreement" / f"{name}.json").read_text())["overall"]
    perplexity = math.exp(means["cross_entropy"])
    return {"perplexity": perplexity, **{m: means[m] for m in METRICS[1:]}}


def means(runs: list[dict]) -> dict[str, Any]:
    """Mean, standard deviation over seeds and 95 % t interval of the mean, for each metric."""
    found: dict[str, Any] = {
        "seeds": [run["seed"] for run in runs],
        "steps": [run["steps"] for run in runs],
        "cpu_s": statistics.fmean(run["cpu_s"] for run in runs),
    }
    for metric in METRICS:
        s = spread([run[metric] for run in runs])
        found[metric] = asdict(s)
        if s.deviation is not None:
            reach = float(student_t.ppf(0.975, s.n - 1)) * s.deviation / math.sqrt(s.n)
            found[metric] |= {"low": s.mean - reach, "high": s.mean + reach}
    return found


def differences(by_setting: dict[str, list[dict]]) -> list[dict]:
    """Welch tests of the planned comparisons in perplexity and KL, with Holm's correction."""
    asked = [
        (first, second)
        for i, first in enumerate(by_setting)
        for second in list(by_setting)[i + 1 :]
        if is_asked(by_setting[first][0], by_setting[second][0])
    ]
    found = []
    for metric in ("perplexity", "forward_kl"):
        tests = [
            difference(*([run[metric] for run in by_setting[name]] for name in pair))
            for pair in asked
        ]
        known = [test.p_value for test in tests if test.p_value is not None]
        corrected = iter(holm(known))
        for pair, test in zip(asked, tests, strict=True):
            p = None if test.p_value is None else next(corrected)
            names = {"first": pair[0], "second": pair[1], "metric": metric}
            found.append(names | asdict(test) | {"p_holm": p})
    return found


def is_asked(a: dict, b: dict) -> bool:
    """Compare layers under one method, or methods on the same layers under one budget."""
    if a["choice"] != b["choice"]:
        return a["method"] == b["method"] and a["budget"] == b["budget"] == "tokens"
    # Distillation defines both budgets.
    return a["budget"] == b["budget"] or "distill" in (a["method"], b["method"])


def show(report: dict[str, Any]) -> None:
    print(f"teacher: perplexity {report['teacher_perplexity']:.2f}")
    for choice, done in report["choices"].items():
        print(
            f"{choice}, before training: layers {done['layers']}, "
            f"perplexity {done['perplexity']:.1f}"
        )
    for name, found in report["means"].items():
        print(f"{name}: {shown(found)}")
    for d in report["differences"]:
        p = d["note"] if d["p_holm"] is None else f"p {d['p_holm']:.2g}"
        print(f"{d['metric']}: {d['first']} - {d['second']}: {d['value']:+.3f} ({p})")


def shown(found: dict) -> str:
    def text(metric: str) -> str:
        s = found[metric]
        low = f" [{s['low']:.3f}, {s['high']:.3f}]" if "low" in s else ""
        return f"{metric} {s['mean']:.3f}{low}"

    metrics = ", ".join(text(metric) for metric in METRICS)
    return f"{metrics}; {found['steps']} steps, {found['cpu_s']:.1f} s CPU"


if __name__ == "__main__":
    main()
