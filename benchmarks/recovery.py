"""Kill a two-rank run with kill -9 many times; it must end bit-equal to an undisturbed run.

python benchmarks/recovery.py --kills 100 --json benchmarks/results/recovery_cpu.json

The run is QLoRA with dropout and a hidden-state loss under ZeRO-2, with a teacher sharded by
ZeRO-3, on the CPU. Every start uses the same command. --seed determines what is killed (rank 0,
rank 1, the launcher, all processes) and when (between steps, during a save, at its rename). An
interrupted benchmark continues in --work. Each kill costs the start of two processes: 8 to 15 s.

With --slurm the killed run is one job of launch/slurm/train.sbatch on two nodes, which requeues
itself after every kill. The nodes must be on this machine, where the processes can be killed.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from kd.recipe import as_flags, parse, setting
from kd.run.finished import is_done
from kd.run.run_record import commit
from kd.training.checkpoints.checkpoint import NAME, SAVING, checkpoints, step_of
from kd.training.checkpoints.manifest import MANIFEST
from kd.training.step_metrics import reproducible

ROOT = Path(__file__).resolve().parents[1]
STEPS_A_KILL, SAVE_STEPS = 6, 2  # upper bound on the steps of a start before its kill
TARGETS, MOMENTS = ("rank 0", "rank 1", "launcher", "all"), ("step", "save", "rename")
MARK = "KD_RECOVERY"  # environment variable that identifies all processes of a run


@dataclass
class RecoverySettings:
    kills: int = setting(10, "Number of kills in a row.")
    json: str | None = setting(None, "Output file.")
    seed: int = setting(0, "Seed that determines what is killed, and when.")
    slurm: bool = setting(
        False, "Kill a SLURM job on two nodes; otherwise a torchrun of two ranks."
    )
    work: str = setting("runs/recovery", "Folder of the two runs; removed at the end.")
    timeout_s: int = setting(180, "Seconds without progress after which a start has failed.")


def main() -> None:
    (settings,) = parse(RecoverySettings, description=__doc__)
    start = Job if settings.slurm else Start
    work = Path(settings.work).resolve()
    steps = STEPS_A_KILL * settings.kills + 8
    make_inputs(work)
    whole, killed = work / "whole", work / "killed"
    if not is_done(str(whole)):
        run = Start(command(work, whole, steps), work / "whole.log")
        run.wait(settings.timeout_s + steps)
        assert is_done(str(whole)), f"the run without kills failed: {work}/whole.log"
    file = work / "kills.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    with open(file, "a") as log:
        for i in tqdm(range(len(done), settings.kills), desc="kills"):
            draw = random.Random(f"{settings.seed} {i}")
            arguments = command(work, killed, steps)
            found = kill_once(start, arguments, killed, draw, settings.timeout_s)
            done.append(found)
            log.write(json.dumps(found) + "\n")
            log.flush()
    last = start(command(work, killed, steps), work / "last.log")
    last.wait(settings.timeout_s + steps)
    assert is_done(str(killed)), f"the last start did not finish:\n{last.printed[-3000:]}"
    result = summary(done, whole, killed, steps)
    result |= {
        "seed": settings.seed,
        "slurm": tracker() if settings.slurm else "",
        "commit": commit(),
    }
    print(json.dumps(result, indent=2))
    if settings.json:
        Path(settings.json).write_text(json.dumps(result, indent=2) + "\n")
    if result["equal"]:
        shutil.rmtree(work)


def make_inputs(work: Path) -> None:
    """Write two random models of different width, and rows; the tokenizer is the quickstart's."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "quickstart" / "student")
    for seed, (name, width) in enumerate({"student": 32, "teacher": 48}.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
        Qwen2ForCausalLM(config).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    words = (ROOT / "README.md").read_text().split()
    texts = [" ".join(words[i : i + 5 + i % 23]) for i in range(0, 400, 5)]
    (work / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def command(work: Path, output: Path, steps: int) -> list[str]:
    flags = {
        "student": work / "student",
        "teacher": work / "teacher",
        "data": json.dumps([{"path": str(work / "rows.jsonl")}]),
        "quantization": "nf4",
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "soft_weight": 0.5,
        "hidden_weight": 0.5,
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": SAVE_STEPS,
        "dataloader_num_workers": 1,
        "disable_tqdm": "true",
        "output_dir": output,
    }
    return ["launch/cpu.sh", "--torchrun", "train/distill.py", *as_flags(flags)]


class Start:
    """One start of the run: its processes and its output."""

    def __init__(self, arguments: list[str], log: Path):
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.printed, self.log = "", log
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=os.environ | {MARK: self.mark},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        with open(self.log, "w") as file:
            for line in self.process.stdout:
                self.printed += line
                file.write(line)

    def wait(self, seconds: float) -> None:
        """Wait for the end of the run, then kill what is left of it."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        finally:
            self.kill(self.alive())

    def ended(self) -> bool:
        return self.process.poll() is not None

    def alive(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["environ", "status", "ppid"])
            if (process.info["environ"] or {}).get(MARK) == self.mark
            and process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    def target(self, name: str) -> list[psutil.Process]:
        alive = self.alive()
        if name == "all":
            return alive
        ranks = {p.pid: p for p in alive if "RANK" in p.info["environ"]}
        ranks = {pid: p for pid, p in ranks.items() if p.info["ppid"] not in ranks}  # no workers
        if name == "launcher":
            launchers = {p.info["ppid"] for p in ranks.values()}
            return [p for p in alive if p.pid in launchers][:1]
        return [p for p in ranks.values() if p.info["environ"]["RANK"] == name[-1]]

    def kill(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Job(Start):
    """One start of the run as a SLURM job; the first submits it, and it requeues itself."""

    number = ""  # of the job
    starts = 0
    mark = str(os.getpid())

    def __init__(self, arguments: list[str], log: Path):
        if self.number:  # requeued by now, unless it was killed before it had saved anything
            wait_for(lambda: self.has_ended() or self.restarts() >= Job.starts, None, 60)
        if not self.number or self.has_ended():
            Job.number, Job.starts = submit(arguments, self.mark), 0
        self.log = ROOT / f"runs/slurm/recovery-{self.number}-node0.out"
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        Job.starts += 1
        self.ask_at = 0.0

    @property
    def printed(self) -> str:
        """What the first node has printed since this start."""
        if not self.log.exists():
            return ""
        with open(self.log) as file:
            file.seek(self.offset)
            return file.read()

    def show(self, field: str) -> str:
        show = ["scontrol", "-o", "show", "job", self.number]
        done = subprocess.run(show, capture_output=True, text=True)
        return (re.findall(rf" {field}=(\S+)", done.stdout) or [""])[0]

    def has_ended(self) -> bool:
        return self.show("JobState") in ("FAILED", "COMPLETED")

    def restarts(self) -> int:
        return int(self.show("Restarts") or 0)

    def ended(self) -> bool:
        """Ask SLURM once a second, because a kill must hit a save of milliseconds."""
        if time.monotonic() < self.ask_at:
            return False
        self.ask_at = time.monotonic() + 1
        return self.has_ended() or self.restarts() >= Job.starts

    def wait(self, seconds: float) -> None:
        wait_for(self.has_ended, None, seconds)

    def alive(self) -> list[psutil.Process]:
        """The processes of the job's tasks; SLURM itself ends the shell that has started them."""
        return [p for p in super().alive() if "SLURM_STEP_ID" in p.info["environ"]]


def submit(arguments: list[str], mark: str) -> str:
    """Submit the run as a job of two nodes with one process each; returns the job's number."""
    (ROOT / "runs/slurm").mkdir(parents=True, exist_ok=True)
    words = ["launch/slurm/train.sbatch", "NUM_PROCESSES=1", *arguments[2:]]
    flags = ["--parsable", "--nodes=2", "--job-name=recovery", "--output=runs/slurm/%x-%j.out"]
    done = subprocess.run(
        ["sbatch", *flags, *words],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def tracker() -> str:
    """How the cluster tracks processes."""
    show = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    return re.findall(r"ProctrackType\s*= (\S+)", show.stdout)[0]


def kill_once(
    start: type[Start], arguments: list[str], output: Path, draw: random.Random, timeout: int
) -> dict:
    """Start the run, kill the drawn target at the drawn moment, and report the outcome."""
    target, moment = draw.choice(TARGETS), draw.choice(MOMENTS)
    # Late enough that every sequence of kills gets past the first save.
    steps, delay = draw.randint(SAVE_STEPS, SAVE_STEPS + 1), draw.random()
    before = newest(output)
    run, begin = start(arguments, output.with_name("start.log")), time.monotonic()
    ended = not wait_for(lambda: run.printed.count(": loss ") >= steps, run, timeout)
    # A save lasts milliseconds; if it is missed, the kill happens between steps.
    late = lambda: run.printed.count(": loss ") >= steps + SAVE_STEPS  # noqa: E731
    if not ended and moment == "save":
        wait_for(lambda: late() or any(output.glob(f"{SAVING}{NAME}*")), run, timeout)
        time.sleep(0.1 * delay)
    elif not ended and moment == "rename":
        wait_for(lambda: late() or any(output.glob(f"{SAVING}{NAME}*/{MANIFEST}")), run, timeout)
        time.sleep(0.004 * delay)
    elif not ended:
        time.sleep(0.3 * delay)
    failed = ended or run.ended()
    killed = time.monotonic()
    run.kill(run.target(target))
    ends_by_itself = wait_for(lambda: not run.alive(), None, 120)
    left = [path.name for path in output.glob(f"{SAVING}{NAME}*")]
    run.kill(run.alive())
    if failed:
        print(run.printed[-3000:])
    return {
        "target": target,
        "moment": moment,
        "from": before,
        "to": newest(output),
        "half_written": left,
        "failed_start": failed,
        "orphans": not ends_by_itself,
        "trained_s": round(killed - begin, 1),
        "ended_s": round(time.monotonic() - killed, 1),
    }


def wait_for(condition, run: Start | None, seconds: float) -> bool:
    """Poll until `condition` holds; False if the run ends or time runs out first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if run and run.ended():
            return False
        time.sleep(0.001 if run else 0.1)
    return False


def newest(output: Path) -> int:
    return max([step_of(path) for path in checkpoints(output)], default=0)


def summary(kills: list[dict], whole: Path, killed: Path, steps: int) -> dict:
    same_weights = digests(whole) == digests(killed)
    same_curve = history(whole) == history(killed)
    wanted = list(range(1, steps + 1))
    return {
        "kills": len(kills),
        "equal": is_done(str(killed)) and same_weights and same_curve,
        "failed_starts": sum(kill["failed_start"] for kill in kills),
        "left_processes_behind": sum(kill["orphans"] for kill in kills),
        "left_a_save_half_written": sum(bool(kill["half_written"]) for kill in kills),
        "targets": {t: sum(kill["target"] == t for kill in kills) for t in TARGETS},
        "moments": {m: sum(kill["moment"] == m for kill in kills) for m in MOMENTS},
        "steps": steps,
        "same_weights": same_weights,
        "same_loss_curve": same_curve,
        "tensorboard_shows_every_step_once": tensorboard_steps(killed) == wanted,
    }


def digests(output: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in output.glob("*.safetensors")
    }


def history(output: Path) -> list[dict]:
    """The training curve: everything logged per step except times and memory."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [reproducible(entry) for entry in log if "loss" in entry]


def tensorboard_steps(output: Path) -> list[int]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars("train/loss")]


if __name__ == "__main__":
    main()
