"""After SIGKILL or a signal, the same command ends with the same weights to the last bit."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import ROOT, logged_steps, start
from small import small_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.recipe import as_flags
from kd.run.signals import STOPPED
from kd.training.step_metrics import reproducible

TORCHRUN = "--torchrun"


def command(models: Path, output: Path, *options: str) -> list[str]:
    """Two processes, accumulation 2, ZeRO-2, teacher sharded by ZeRO-3.

    QLoRA with dropout, a hidden-state loss and on-policy rows.
    """
    flags = {
        "student": models / "student",
        "teacher": models / "teacher",
        "data": json.dumps([{"path": str(models / "rows.jsonl")}]),
        "quantization": "nf4",
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "soft_weight": 0.5,
        "hidden_weight": 0.5,
        "student_fraction": 0.4,
        "max_new_tokens": 8,
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "dataloader_num_workers": 2,
        "output_dir": output,
    }
    return ["launch/cpu.sh", *options, "train/distill.py", *as_flags(flags)]


def disturb(
    arguments: list[str], steps: int, code: int, act: Callable[[int, list[int]], None]
) -> str:
    """Start the command; call act(launcher, ranks) with process ids after `steps` logged steps.

    Returns what was printed; the launcher must end with exit code `code`.
    """
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.PIPE
    job = subprocess.Popen(
        arguments, cwd=ROOT, env=env, text=True, stdout=out, stderr=subprocess.STDOUT
    )
    printed = ""
    for line in job.stdout:
        printed += line
        if logged_steps(printed) >= steps:
            break
    ranks = {p.environ().get("RANK"): p.pid for p in psutil.Process(job.pid).children()}
    assert {"0", "1"} <= set(ranks), printed[-6000:]
    descendants = psutil.Process(job.pid).children(recursive=True)
    act(job.pid, [ranks["0"], ranks["1"]])
    printed += job.communicate(timeout=400)[0]
    assert job.returncode == code, printed[-6000:]
    _, orphans = psutil.wait_procs(descendants, timeout=100)
    assert not orphans
    return printed


def listening_addresses(pid: int) -> list[str]:
    """The local addresses on which a process listens."""
    connections = psutil.Process(pid).net_connections("inet")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


def weights(output: Path) -> list[str]:
    files = [output / f"{name}.safetensors" for name in ("adapter_model", "hidden_projections")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def curve(output: Path) -> list[dict]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [reproducible(entry) for entry in history if "loss" in entry]


def tensorboard_steps(output: Path) -> list[int]:
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    return [event.step for event in events.Scalars("train/loss")]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """An uninterrupted run."""
    rows = "\n".join(json.dumps(row) for row in small_rows(77))
    (models / "rows.jsonl").write_text(rows + "\n")
    output = tmp_path_factory.mktemp("resume") / "whole"
    job = start(*command(models, output))
    assert (output / "done.json").exists(), job.stdout[-6000:]
    return output


def test_signals_and_a_kill_cost_no_step_and_no_bit(models, whole, tmp_path):
    """SIGUSR1 to one rank, Ctrl-C to the launcher, which forwards it, and SIGKILL to one rank.

    The first two are started by torchrun, the others, like the whole run, by accelerate launch. The
    kill comes within the second epoch, in which rows have another order; each epoch ends with blank
    rows. All sockets of the run listen on the loopback interface.
    """

    def interrupt(launcher: int, ranks: list[int]) -> None:
        for pid in (launcher, *ranks):
            listening.extend(listening_addresses(pid))
        os.kill(launcher, signal.SIGINT)

    listening: list[str] = []
    output = tmp_path / "run"
    stopped = command(models, output, TORCHRUN)
    first = disturb(stopped, 3, 138, lambda launcher, ranks: os.kill(ranks[1], signal.SIGUSR1))
    step = json.loads((output / STOPPED).read_text())["step"]
    assert f"stopped by SIGUSR1 after step {step} of 30" in first, first[-6000:]
    assert logged_steps(first) == step < 15

    second = disturb(stopped, 3, 130, interrupt)
    assert len(listening) >= 3 and set(listening) <= {"127.0.0.1", "::1"}
    assert f"resuming from {output}/checkpoint-{step}" in second, second[-6000:]
    later = json.loads((output / STOPPED).read_text())["step"]
    assert f"stopped by SIGINT after step {later} of 30" in second, second[-6000:]
    assert "Traceback" not in first + second
    assert "DataLoader worker" not in second and logged_steps(second) == later - step

    killed = command(models, output)
    kill = lambda launcher, ranks: os.kill(ranks[1], signal.SIGKILL)  # noqa: E731
    third = disturb(killed, 14 - later, 137, kill)
    assert f"resuming from {output}/checkpoint-{later}" in third, third[-6000:]
    assert not (output / "done.json").exists()

    last = start(*killed)
    assert (output / "done.json").exists(), last.stdout[-6000:]
    assert not (output / STOPPED).exists()
    resumed = re.search(r"resuming from .*checkpoint-(\d+)", last.stdout)
    assert 12 <= int(resumed.group(1)) < 20, last.stdout[-6000:]
    assert weights(output) == weights(whole) and curve(output) == curve(whole)
    assert tensorboard_steps(output) == tensorboard_steps(whole)
