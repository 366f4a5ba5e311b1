"""The GPU tests and all benchmarks, part by part in the order of their worth: benchmarks/gpu.sh calls it.

python benchmarks/gpu.py --dry_run

Each part has a limit of its own, and all together --minutes; one that fails or is stopped leaves the
others alone. Written after every part, so that a stop from outside loses no more than the present
one: gpu.json (state, seconds, figures and the last lines of each), table.txt and log.txt. Ends with
0 where every part is well, 1 where one is not, 2 where there is no GPU. Needs only PyTorch itself.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
FIGURES, FOLDER = "{figures}", "{folder}"  # in a command: the part's JSON, a folder to work in
LEAST_S = 10  # a part is not begun with less time
TAIL = 40  # lines of a part that did not end well
MACHINE = (  # in a process of its own: CUDA is not initialised in this one
    "import json, platform, torch; on = torch.cuda.is_available(); print(json.dumps({'device': "
    "torch.cuda.get_device_name() if on else None, 'memory_gib': torch.cuda.get_device_properties"
    "(0).total_memory / 2**30 if on else None, 'torch': torch.__version__, 'cuda': "
    "torch.version.cuda, 'python': platform.python_version()}))"
)


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    limit_s: float


def main() -> int:
    settings = arguments()
    parts = known_parts()
    if settings.parts:
        parts = [Part(**part) for part in json.loads(Path(settings.parts).read_text())]
    if settings.dry_run:
        for part in parts:
            print(f"{part.name}, {part.limit_s:.0f} s: {shlex.join(part.command)}")
        return 0
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    machine = json.loads(output_of(PYTHON, "-c", MACHINE) or "{}")
    about = {"machine": machine | {"cores": os.cpu_count()}, "commit": commit(settings.commit)}
    end = (settings.began or time.time()) + 60 * settings.minutes
    gpu = machine.get("device") or settings.without_gpu
    rows: list[dict] = []
    for i, part in enumerate(parts):
        left = end - time.time()
        if not gpu or left < LEAST_S:
            why = "there is no GPU" if not gpu else "no time was left"
            rows.append(asdict(part) | {"state": f"not run: {why}", "seconds": 0.0})
        else:
            rows.append(run(part, min(part.limit_s, left), out / "log.txt"))
        print(f"{rows[-1]['name']}: {rows[-1]['state']}, {rows[-1]['seconds']:.0f} s", flush=True)
        waiting = [asdict(p) | {"state": "not begun", "seconds": 0.0} for p in parts[i + 1 :]]
        write(out, about | {"parts": rows + waiting})
    print((out / "table.txt").read_text())
    return 2 if not gpu else int(any(row["state"] != "ok" for row in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/gpu"), help="folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts, with --began")
    parser.add_argument("--began", type=float, help="seconds since 1970; now, if not given")
    parser.add_argument("--parts", help="JSON file of other parts: name, command, limit_s of each")
    parser.add_argument("--without_gpu", action="store_true", help="run them without a GPU, too")
    parser.add_argument("--commit", help="of this tree, where there is no git to ask")
    parser.add_argument("--dry_run", action="store_true", help="print the parts")
    return parser.parse_args()


def known_parts() -> list[Part]:
    def benchmark(name: str, *flags: str) -> list[str]:
        return [PYTHON, f"benchmarks/{name}.py", *flags, "--json", FIGURES]

    loss = ["--tokens", "4096", "16384", "--divergences", "forward_kl", "jensen_shannon"]
    return [
        Part("tests", [PYTHON, "-m", "pytest", *PYTEST, *gpu_test_files()], 200),
        Part("step", benchmark("step", "--quick"), 150),
        Part("loss", benchmark("loss", *loss), 60),
        Part("teacher kernels", benchmark("teacher", "--gpu_parts", "--gpu_step", "false"), 40),
        Part("training", ["bash", "-c", TRAINING], 80),
        Part("plan", benchmark("plan", *PLANNED), 90),
        Part("log_cost", benchmark("log_cost"), 40),
        Part("step, larger", benchmark("step", *LARGER, "--turns", "1"), 150),
        Part("teacher", benchmark("teacher", "--gpu_parts"), 240),
    ]


LARGER = ["--cases", "distil_1.5b_qlora", "sft_0.5b_lora"]
PLANNED = ["--student", "1024", "12", "--teacher", "1280", "16", "--length", "1024", "--micro", "4"]
PLANNED += ["--layouts", "full, ZeRO-2, bf16, teacher sharded"]
PLANNED += ["QLoRA, ZeRO-2, bf16, teacher sharded", "LoRA, DDP, checkpointing"]
PYTEST = ["-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts="]
# A profile as it is, on small models: the one road on which launcher, DeepSpeed, NF4 and NCCL meet.
TRAINING = (
    f"set -e; {shlex.quote(PYTHON)} data/quickstart/docstrings.py --out_dir runs/quickstart/data; "
    "launch/h100.sh train/distill.py --config recipes/small/d_distill.yaml --max_steps 8 "
    f"--teacher_deepspeed ds_configs/teacher_zero3.json --output_dir {FOLDER}/run; "
    f"cp {FOLDER}/run/done.json {FIGURES}"
)


def gpu_test_files() -> list[str]:
    """Only these: other test files import packages that are not among the wheels."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    chosen = [file for file in files if "pytest.mark.gpu" in file.read_text()]
    return [str(file.relative_to(ROOT)) for file in chosen]


def run(part: Part, limit_s: float, log: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        places = {FIGURES: str(figures), FOLDER: folder}
        command = part.command
        for mark, value in places.items():
            command = [word.replace(mark, value) for word in command]
        began = time.time()
        with open(Path(folder) / "output", "w+") as output:
            state = outcome(command, limit_s, output)
            output.seek(0)
            text = output.read()
        seconds = time.time() - began
        with open(log, "a") as file:
            file.write(f"==== {part.name}: {state}, {seconds:.0f} s\n{text}\n")
        row = asdict(part) | {"state": state, "seconds": seconds}
        row["figures"] = read_figures(figures) or count_tests(text)
        if state != "ok":
            row["output"] = text.splitlines()[-TAIL:]
        return row


def outcome(command: list[str], limit_s: float, output) -> str:
    """ok, failed (with the exit code), or stopped at its limit with all that it started."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return f"failed: {error}"
    try:
        code = process.wait(limit_s)
        return "ok" if code == 0 else f"failed: exit code {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks that outlived a failed parent, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_figures(file: Path):
    """What the part has written; rows are whole even where it was stopped between two of them."""
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def count_tests(text: str) -> dict | None:
    found = re.findall(r"^(tests/\S+?::\S.*?) (PASSED|FAILED|SKIPPED|ERROR)\b", text, re.M)
    if not found:
        return None
    states = [state for _, state in found]
    counts = {state.lower(): states.count(state) for state in ("PASSED", "FAILED", "SKIPPED")}
    bad = sorted({name for name, state in found if state in ("FAILED", "ERROR")})
    return counts | {"failures": bad}


def write(out: Path, report: dict) -> None:
    temporary = out / "gpu.json.tmp"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(out / "gpu.json")
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items())]
    lines += [f"commit {report['commit']}", ""]
    lines += [
        f"{row['name']:<18}{row['seconds']:6.0f} s  {row['state']}" for row in report["parts"]
    ]
    figures = output_of(PYTHON, "benchmarks/readme.py", "--gpu", str(out / "gpu.json"))
    (out / "table.txt").write_text("\n".join(lines) + f"\n\n{figures}")


def commit(given: str | None) -> str | None:
    return given or output_of("git", "rev-parse", "HEAD").strip() or None


def output_of(*command: str) -> str:
    """What it prints; nothing where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
