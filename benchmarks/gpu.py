"""Run the GPU tests and benchmarks of one set, most valuable first; called by benchmarks/gpu.sh.

python benchmarks/gpu.py --set first --dry_run

Each part has a time limit; the limits of a set add up to less than --minutes, which limits the
whole run. A part that fails or times out does not affect the others. Three files are written after
every part, so an interruption loses at most the current one: SET.json (state, seconds, metrics and
last output lines of each part), SET.txt (tables) and SET.log. The exit code is 0 if all parts
succeeded, 1 if one did not, 2 without a GPU. The script itself needs only PyTorch.
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
METRICS, FOLDER = "{metrics}", "{folder}"  # placeholders: the part's JSON, its working folder
LEAST_S = 10  # a part does not start with less time left
TAIL = 40  # output lines kept of a part that failed
MACHINE = (  # runs in another process, so that this one does not initialise CUDA
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
    parts = known_parts()[settings.set]
    if settings.parts:
        parts = [Part(**part) for part in json.loads(Path(settings.parts).read_text())]
    if settings.dry_run:
        for part in parts:
            print(f"{part.name}, {part.limit_s:.0f} s: {shlex.join(part.command)}")
        return 0
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{settings.set}.log"
    log.write_text("")
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
            rows.append(run(part, min(part.limit_s, left), log))
        print(f"{rows[-1]['name']}: {rows[-1]['state']}, {rows[-1]['seconds']:.0f} s", flush=True)
        waiting = [asdict(p) | {"state": "not begun", "seconds": 0.0} for p in parts[i + 1 :]]
        write(out / f"{settings.set}.json", about | {"parts": rows + waiting})
    print((out / f"{settings.set}.txt").read_text())
    return 2 if not gpu else int(any(row["state"] != "ok" for row in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default=str(ROOT / "benchmarks/results/gpu"), help="Folder for the report."
    )
    parser.add_argument("--set", default="first", choices=known_parts(), help="Set of parts.")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="Time limit of all parts together."
    )
    parser.add_argument(
        "--began", type=float, help="Start time as seconds since 1970; default: now."
    )
    parser.add_argument("--parts", help="JSON file with other parts: name, command, limit_s.")
    parser.add_argument(
        "--without_gpu", action="store_true", help="Also run where there is no GPU."
    )
    parser.add_argument("--commit", help="Commit to record where git is not available.")
    parser.add_argument("--dry_run", action="store_true", help="Print the parts and exit.")
    return parser.parse_args()


def known_parts() -> dict[str, list[Part]]:
    """The parts of each set, in the order of their value."""

    def benchmark(name: str, *flags: str) -> list[str]:
        return [PYTHON, f"benchmarks/{name}.py", *flags, "--json", METRICS]

    teacher = ["--gpu_parts", "--gpu_step", "false"]
    two_ranks = ["--gpu_parts", "--gpu_kernels", "false", "--gpu_layers", "16", "12"]
    return {
        "first": [
            Part("tests", [PYTHON, "-m", "pytest", *PYTEST, *gpu_test_files()], 190),
            Part("loss", benchmark("loss", *LOSS), 110),
            Part("step", benchmark("step", "--quick"), 160),
            Part("teacher kernels", benchmark("teacher", *teacher), 40),
        ],
        "second": [
            Part("step, 32B to 14B", benchmark("step", *LARGEST), 230),
            Part("training in float16", ["bash", "-c", FLOAT16], 80),
            Part("teacher, two ranks", benchmark("teacher", *two_ranks), 80),
            Part("quickstart", ["bash", "-c", QUICKSTART], 120),
        ],
        "third": [
            Part("plan", benchmark("plan", *PLANNED), 120),
            Part("training", ["bash", "-c", TRAINING], 80),
            Part("step, larger", benchmark("step", *LARGER, "--turns", "1"), 200),
            Part("log_cost", benchmark("log_cost"), 60),
        ],
    }


# Qwen2.5 has 151 665 ids, a vocabulary without vector loads, and pads its heads to 152 064.
LOSS = ["--vocabularies", "151665", "152064", "--tokens", "4096", "16384"]
LOSS += ["--divergences", "forward_kl", "jensen_shannon"]
LARGEST = ["--cases", "distil_14b_qlora", "--implementations", "ours", "--turns", "1"]
LARGEST += ["--steps", "3"]
LARGER = ["--cases", "distil_1.5b_qlora", "sft_0.5b_lora"]
PLANNED = ["--student", "1024", "12", "--teacher", "1280", "16", "--length", "1024", "--micro", "4"]
PLANNED += ["--layouts", "full, ZeRO-2, bf16, teacher sharded"]
PLANNED += ["QLoRA, ZeRO-2, bf16, teacher sharded", "LoRA, DDP, checkpointing"]
PYTEST = ["-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", "-o", "addopts="]
# A launch profile on small models: launcher, DeepSpeed, NF4 and NCCL together.
DATA = (
    "set -e; [ -f runs/quickstart/data/chat_heldout.jsonl ] || "
    f"{shlex.quote(PYTHON)} data/quickstart/docstrings.py --out_dir runs/quickstart/data; "
)
DISTIL = (
    "train/distill.py --config recipes/small/d_distill.yaml "
    f"--teacher_deepspeed ds_configs/teacher_zero3.json --output_dir {FOLDER}/run"
)
RESULT = f"; cp {FOLDER}/run/done.json {METRICS}"
TRAINING = f"{DATA} launch/h100.sh {DISTIL} --max_steps 8 {RESULT}"
FLOAT16 = (  # the profile of a T4 on whatever GPU is here: float16, SDPA, 14.7 GiB
    f"{DATA} NUM_PROCESSES=1 launch/2xt4.sh {DISTIL} --machine t4 --gpu_memory_gb 14.7 "
    "--precision float16 --deepspeed ds_configs/student_zero2.json --attn_implementation sdpa "
    f"--gradient_checkpointing true --max_steps 20 {RESULT}"
)
QUICKSTART = f"{DATA} SETUP=none SEEDS=0 launch/quickstart.sh --gpu"
QUICKSTART += f"; cp runs/quickstart/report.json {METRICS}"


def gpu_test_files() -> list[str]:
    """Files with GPU tests; other test files import packages that are not among the wheels."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    chosen = [file for file in files if "pytest.mark.gpu" in file.read_text()]
    return [str(file.relative_to(ROOT)) for file in chosen]


def run(part: Part, limit_s: float, log: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.json"
        values = {METRICS: str(metrics), FOLDER: folder}
        command = part.command
        for mark, value in values.items():
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
        row["metrics"] = read_metrics(metrics) or count_tests(text)
        if state != "ok":
            row["output"] = text.splitlines()[-TAIL:]
        return row


def outcome(command: list[str], limit_s: float, output) -> str:
    """Run a command: "ok", "failed" with the exit code, or "stopped" together with its children."""
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
        with contextlib.suppress(ProcessLookupError):  # also ranks that outlive a failed parent
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_metrics(file: Path):
    """The JSON that a part wrote; None if there is none."""
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


def write(file: Path, report: dict) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(file)
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items())]
    lines += [f"commit {report['commit']}", ""]
    lines += [
        f"{row['name']:<20}{row['seconds']:6.0f} s  {row['state']}" for row in report["parts"]
    ]
    tables = output_of(PYTHON, "benchmarks/readme.py", "--gpu", str(file))
    file.with_suffix(".txt").write_text("\n".join(lines) + f"\n\n{tables}")


def commit(given: str | None) -> str | None:
    return given or output_of("git", "rev-parse", "HEAD").strip() or None


def output_of(*command: str) -> str:
    """The standard output of a command; empty if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
