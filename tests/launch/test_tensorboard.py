"""What a user sees in the browser after a run that was killed once: curves, texts, hparams."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from processes import ROOT, logged_steps, start
from slurm_cluster import free_ports
from small import small_rows

from kd.recipe import as_flags
from kd.training.tensorboard import write_hparams

pytestmark = pytest.mark.slow
STEPS = 16


@pytest.fixture(scope="module")
def browser_installed() -> None:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        as_root = [] if os.getuid() == 0 else ["sudo", "-n"]
        for command in (["update", "-qq"], ["install", "-y", "-qq", "chromium", "chromium-driver"]):
            subprocess.run([*as_root, "apt-get", *command], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> Path:
    """A distillation with two processes, killed after step 6 of 16 and resumed, and its sibling.

    The sibling has other settings and no curves.
    """
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in (("rows", small_rows(64)), ("heldout", small_rows(6))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {
        "student": models / "student",
        "teacher": models / "teacher",
        "data": json.dumps([{"path": str(folder / "rows.jsonl")}]),
        "eval_data": json.dumps([{"path": str(folder / "heldout.jsonl")}]),
        "soft_weight": 0.5,
        "global_batch_size": 8,
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "save_steps": 4,
        "sample_tokens": 6,
        "output_dir": folder / "distill",
    }
    command = ["launch/cpu.sh", "train/distill.py", *as_flags(flags)]
    kill_after(command, 6)
    again = start(*command)
    assert "resuming from" in again.stdout, again.stdout[-4000:]
    assert (folder / "distill" / "done.json").exists(), again.stdout[-4000:]
    recipe = json.loads((folder / "distill" / "run.json").read_text())["recipe"]
    other = recipe | {"soft_weight": 0.75, "temperature": 3.0}
    write_hparams(str(folder / "sibling" / "tensorboard"), other)
    return folder


def kill_after(command: list[str], steps: int) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    printed = ""
    for line in job.stdout:
        printed += line
        if logged_steps(printed) >= steps:
            break
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert logged_steps(printed) >= steps, printed[-4000:]


@pytest.fixture(scope="module")
def address(runs):
    """launch/tensorboard.sh on the run, ended with all its children."""
    (port,) = free_ports(1)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    board = subprocess.Popen(
        ["launch/tensorboard.sh", str(runs), "--port", str(port)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert f"ssh -N -L {port}:localhost:{port}" in board.stdout.readline()
        address = f"http://localhost:{port}"
        wait_for(lambda: steps_of(address, "eval/loss")[-1] == STEPS)  # the last that is written
        yield address
    finally:
        os.killpg(board.pid, signal.SIGTERM)
        board.wait()


def wait_for(condition, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError("not in time")


def get(address: str, path: str):
    with urllib.request.urlopen(f"{address}/data/{path}", timeout=60) as answer:
        return json.load(answer)


def tags(address: str) -> set[str]:
    found = get(address, "plugin/scalars/tags")
    return {tag for run in found.values() for tag in run}


def steps_of(address: str, tag: str) -> list[int]:
    runs = get(address, "plugin/scalars/tags")
    (run,) = [run for run, tags in runs.items() if tags] or [""]
    points = get(address, f"plugin/scalars/scalars?run={run}&tag={tag}")
    return [step for _, step, _ in points]


def test_every_curve_is_there_and_no_step_twice(address):
    terms = {"loss", "cross_entropy", "divergence", "top1_agreement", "teacher_label_probability"}
    entropies = {"student_entropy", "teacher_entropy", "learning_rate", "grad_norm"}
    seconds = {
        f"seconds_{x}"
        for x in ["step", "data", "teacher", "student", "loss", "backward", "optimizer"]
    }
    others = {"target_tokens_per_second", "padding_share", "memory_gib"}
    wanted = {f"train/{name}" for name in terms | entropies | seconds | others}
    wanted |= {f"eval/{name}" for name in ("loss", "cross_entropy", "divergence", "top1_agreement")}
    assert wanted <= tags(address), wanted - tags(address)
    for tag in ("train/divergence", "train/seconds_teacher"):
        assert steps_of(address, tag) == list(range(1, STEPS + 1))


def test_a_browser_shows_the_layout_the_curves_the_samples_and_the_settings(
    address, browser_installed, tmp_path
):
    from browser import chromium, text_with

    with chromium(tmp_path) as driver:
        driver.get(f"{address}/#custom_scalars")
        text_with(driver, "Read this first", "loss and its two terms", "held out", "Speed")
        driver.get(f"{address}/#timeseries")
        text = text_with(driver, "eval /cross_entropy", "eval /divergence", "training_data")
        cards = re.findall(r"(\w+) /(\w+)", text)
        assert cards[:2] == [("eval", "cross_entropy"), ("eval", "divergence")], text[:3000]
        assert re.search(r"eval \d+ cards.*train \d+ cards.*training_data \d+ cards", text), text
        driver.get(f"{address}/#text")
        text_with(driver, "eval/samples", "teacher", "student", "beginning")
        driver.get(f"{address}/#hparams")
        text = text_with(driver, "soft_weight", "learning_rate", "eval/divergence")
        assert "Hyperparameters soft_weight temperature" in text, text[:3000]  # those that differ
