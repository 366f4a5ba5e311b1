"""kill -9, the same command again, and the end is the same to the last bit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from processes import ROOT, start
from small import small_rows


def command(models: Path, output: Path) -> list[str]:
    """QLoRA with dropout and a hidden-state loss under ZeRO-2, teacher sharded by ZeRO-3, two processes, accumulation 2."""
    flags = {
        "student": models / "student",
        "teacher": models / "teacher",
        "data": json.dumps([{"path": str(models / "rows.jsonl")}]),
        "quantization": "nf4",
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "soft_weight": 0.5,
        "hidden_weight": 0.5,
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "output_dir": output,
    }
    spelt = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
    return ["launch/cpu.sh", "train/distill.py", *spelt]


def run_and_kill(arguments: list[str], steps: int) -> str:
    """Start the command and kill -9 one of its ranks once it has logged `steps` steps."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = subprocess.PIPE
    job = subprocess.Popen(
        arguments, cwd=ROOT, env=env, text=True, stdout=out, stderr=subprocess.STDOUT
    )
    printed = ""
    for line in job.stdout:
        printed += line
        if printed.count("'grad_norm'") >= steps:
            break
    ranks = psutil.Process(job.pid).children(recursive=True)
    ranks = [p for p in ranks if "train/distill.py" in p.cmdline() and "launch" not in p.cmdline()]
    assert len(ranks) == 2, printed[-6000:]
    os.kill(ranks[1].pid, signal.SIGKILL)
    printed += job.communicate(timeout=120)[0]
    assert job.returncode != 0
    return printed


def weights(output: Path) -> list[str]:
    files = [output / f"{name}.safetensors" for name in ("adapter_model", "hidden_projections")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_killed_run_goes_on_by_the_same_command_to_bit_equal_weights(models, tmp_path):
    rows = "\n".join(json.dumps(row) for row in small_rows(80))
    (models / "rows.jsonl").write_text(rows + "\n")
    whole = start(*command(models, tmp_path / "whole"))
    assert (tmp_path / "whole" / "done.json").exists(), whole.stdout[-6000:]

    killed = command(models, tmp_path / "killed")
    run_and_kill(killed, steps=10)
    assert not (tmp_path / "killed" / "done.json").exists()
    again = start(*killed)
    assert "going on from" in again.stdout and "checkpoint-" in again.stdout, again.stdout[-6000:]
    assert (tmp_path / "killed" / "done.json").exists()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")

    third = start(*killed)  # a finished run is not touched
    assert third.returncode == 0 and "is finished already" in third.stdout
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
