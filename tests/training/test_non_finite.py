"""A failing run reports what failed, on which rows, rank and machine."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from processes import ROOT, logged_steps, start
from scripts import run_main
from small import small_rows
from transformers import AutoModelForCausalLM

from kd.data.tokenizer import load_tokenizer
from kd.recipe import as_flags
from kd.settings.distillation import DataSettings, ModelSettings, Objective
from kd.settings.teacher import TeacherSettings
from kd.settings.training_arguments import training_arguments
from kd.settings.training_recipe import Recipe
from kd.training.out_of_memory import explain_out_of_memory
from kd.training.stragglers import straggler
from kd.training.watchdog import NAME, Watchdog

BAD = "Zebra quartz"  # in one row only; one of its tokens has a NaN embedding
ROWS = DataSettings(data='[{"path": "rows.jsonl"}]')  # max_length 1024


@pytest.fixture(scope="module")
def work(models, tmp_path_factory):
    """A student with a NaN embedding of a token that occurs in only one row."""
    folder = tmp_path_factory.mktemp("non_finite")
    tokenizer = load_tokenizer(str(models / "student"))
    rows = [{"text": row["text"]} for row in small_rows(60) if "text" in row]
    known = {i for row in rows for i in tokenizer(row["text"])["input_ids"]}
    bad = next(i for i in tokenizer(BAD)["input_ids"] if i not in known)
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[17] = {"text": BAD}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    student.config.tie_word_embeddings = False
    embedding = student.get_input_embeddings().weight.data
    student.lm_head.weight = torch.nn.Parameter(embedding.clone())
    embedding[bad] = math.nan
    student.save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return folder


def flags(models, work, output, **changes) -> list[str]:
    settings = {
        "student": work / "student",
        "teacher": models / "teacher",
        "lora_rank": 4,
        "data": json.dumps([{"path": str(work / "rows.jsonl")}]),
        "global_batch_size": 4,
        "max_per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": output,
    } | changes
    return as_flags(settings)


def test_a_step_without_a_finite_loss_is_reported_and_skipped(models, work, tmp_path, capsys):
    command = flags(models, work, tmp_path / "run")
    run_main("train/distill.py", *command)
    assert (tmp_path / "run" / "done.json").exists()
    printed = "".join(capsys.readouterr())
    named = re.search(r"step (\d+): the loss is not finite in (.*)", printed)
    assert f"row 17 ('{BAD}')" in named.group(2)
    assert f"step {named.group(1)} is skipped (1 of 3 in a row)" in printed
    curve = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses].count(
        False
    ) == 1  # the following steps are good


def test_too_many_such_steps_end_the_run_with_rank_rows_and_a_final_message(models, work, tmp_path):
    """Two ranks, DeepSpeed: the launcher prints the mistake last, once for both ranks."""
    command = flags(models, work, tmp_path / "run", max_skipped_steps=0)
    job = start("launch/cpu.sh", "--torchrun", "train/distill.py", *command)
    assert job.returncode == 2 and not (tmp_path / "run" / "done.json").exists()
    named = [line for line in job.stdout.splitlines() if f"row 17 ('{BAD}')" in line]
    assert len(named) == 1 and named[0].startswith("[rank "), job.stdout[-4000:]
    assert job.stdout.count("error: 1 steps in a row were not finite") == 1, job.stdout[-4000:]
    assert "error: 1 steps in a row were not finite" in job.stdout.splitlines()[-1]


def test_a_run_that_ends_in_a_skipped_step_has_failed_and_keeps_its_good_checkpoint(
    models, work, tmp_path
):
    """The second and last step has the bad row."""
    rows = (work / "good.jsonl").read_text().split("\n")[:7] + [json.dumps({"text": BAD})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = json.dumps([{"path": str(tmp_path / "rows.jsonl")}])
    order = {"train_sampling_strategy": "sequential", "save_steps": 1, "report_to": "none"}
    command = flags(models, work, tmp_path / "run", data=data, **order)
    for _ in range(2):  # a second start must not take the skipped step for a good end
        with pytest.raises(ValueError, match="has failed: its last 1 steps were not finite") as end:
            run_main("train/distill.py", *command)
        assert "The last good checkpoint in" in str(end.value) and "checkpoint-1." in str(end.value)
        left = {path.name for path in (tmp_path / "run").iterdir()}
        assert "checkpoint-1" in left
        assert not left & {"done.json", "checkpoint-2", "adapter_model.safetensors"}


def test_nothing_watches_the_process_of_a_run_that_has_failed(models, work, tmp_path):
    """A notebook lives on: nothing may end it after ddp_timeout, or keep its signals."""
    before = signal.getsignal(signal.SIGTERM)
    command = flags(models, work, tmp_path / "run", max_skipped_steps=0, report_to="none")
    with pytest.raises(ValueError, match="1 steps in a row were not finite"):
        run_main("train/distill.py", *command)
    assert signal.getsignal(signal.SIGTERM) == before
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("moment", ["on_train_begin", "on_optimizer_step"])
def test_a_weight_that_is_not_finite_is_not_saved(models, work, tmp_path, monkeypatch, moment):
    """In the model that is loaded, and after the last update, which no loss shows."""

    def spoil(self, args, state, control, model=None, **_):
        next(p for p in model.parameters() if p.requires_grad).data[-1, -1] = math.nan

    monkeypatch.setattr(Watchdog, moment, spoil)
    data = json.dumps([{"path": str(work / "good.jsonl")}])
    keys = {"data": data, "max_steps": 1, "save_strategy": "no", "report_to": "none"}
    with pytest.raises(ValueError, match=r"lora_A.default.weight has values that are NaN"):
        run_main("train/distill.py", *flags(models, work, tmp_path / "run", **keys))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"done.json", "adapter_model.safetensors"}


@pytest.mark.slow
def test_a_slow_rank_is_reported_and_a_silent_one_ends_the_run(models, work, tmp_path):
    """Rank 1 is suspended nine tenths of the time, then for good.

    A forward of 128 rows lasts many such cycles; a short one could always fall between two stops.
    """
    rows = (work / "good.jsonl").read_text().split("\n")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows * (512 // len(rows))))
    data = json.dumps([{"path": str(tmp_path / "rows.jsonl")}])
    changes = {"max_steps": 100_000, "save_steps": 100_000, "ddp_timeout": 40, "data": data}
    changes |= {"global_batch_size": 256, "max_per_device_train_batch_size": 128}
    command = flags(models, work, tmp_path / "run", **changes)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(
        ["launch/cpu.sh", "--torchrun", "train/distill.py", *command],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=open(tmp_path / "log", "w"),  # noqa: SIM115
        stderr=subprocess.STDOUT,
    )
    printed = (tmp_path / "log").read_text
    await_text(lambda: logged_steps(printed()) > 3, job, printed)
    rank = next(p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1")
    end = time.monotonic() + 300
    while "rank 1 on" not in printed() and time.monotonic() < end:
        rank.suspend()
        time.sleep(0.036)
        rank.resume()
        time.sleep(0.004)
    assert "rank 1 on" in printed() and "the others' time per token" in printed(), printed()
    seen = logged_steps(printed())
    await_text(lambda: logged_steps(printed()) > seen + 2, job, printed)
    rank.send_signal(signal.SIGSTOP)
    assert job.wait(400) != 0
    assert f"No report from: pid {rank.pid} on" in printed(), printed()[-4000:]
    assert not rank.is_running()


def await_text(condition, job, printed) -> None:
    while not condition():
        assert job.poll() is None, printed()[-4000:]
        time.sleep(0.1)


def test_check_overfits_eight_rows_and_leaves_the_run_untouched(models, work, tmp_path):
    data = json.dumps([{"path": str(work / "good.jsonl")}])
    command = flags(models, work, tmp_path / "run", data=data, learning_rate=1e-2)
    job = start("launch/cpu.sh", "--torchrun", "train/distill.py", *command, "--check")
    assert job.returncode == 0, job.stdout[-4000:]
    fell = re.search(r"check: the loss fell from (\S+) to (\S+) in 10 steps on 8 rows", job.stdout)
    assert float(fell.group(2)) < 0.9 * float(fell.group(1))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["check"]


def test_check_fails_if_the_loss_does_not_fall(models, work, tmp_path):
    data = json.dumps([{"path": str(work / "good.jsonl")}])
    command = flags(models, work, tmp_path / "run", data=data, learning_rate=0.0)
    with pytest.raises(ValueError, match="wanted a fall of 10% or more"):
        run_main("train/distill.py", *command, "--check")


def test_out_of_memory_lists_remedies_that_this_run_has_not_tried(tmp_path):
    training = training_arguments(
        output_dir=str(tmp_path), global_batch_size=8, use_cpu=True, report_to=["none"]
    )
    teacher = TeacherSettings(teacher="t", teacher_deepspeed="ds_configs/teacher_zero3.json")
    with (
        pytest.raises(ValueError, match="tried to allocate") as caught,
        explain_out_of_memory(
            Recipe("s", ModelSettings(lora_rank=8), ROWS, training, teacher, Objective())
        ),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)  # the CPU's allocator rejects it
    message = str(caught.value)
    for change in ("--max_per_device_train_batch_size 4 (now 8)", "teacher_zero3_offload.json"):
        assert change in message
    for change in ("--gradient_checkpointing true", "quantization: nf4", "less than 1024"):
        assert change in message
    assert "lora_rank: 16" not in message


def test_other_errors_pass_unchanged(tmp_path):
    training = training_arguments(
        output_dir=str(tmp_path), global_batch_size=8, use_cpu=True, report_to=["none"]
    )
    with (
        pytest.raises(RuntimeError, match="another"),
        explain_out_of_memory(Recipe("m", ModelSettings(), ROWS, training)),
    ):
        raise RuntimeError("another")


@pytest.mark.gpu
def test_out_of_memory_of_a_gpu_is_explained(tmp_path):
    training = training_arguments(output_dir=str(tmp_path), global_batch_size=8, report_to=["none"])
    with (
        pytest.raises(ValueError, match="out of memory on cuda"),
        explain_out_of_memory(Recipe("m", ModelSettings(), ROWS, training)),
    ):
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")


def test_the_straggler_is_the_slowest_rank_with_its_share_of_lost_time():
    ranks = [(0.001, 1000, "a"), (0.004, 1000, "b"), (0.001, 1000, "b"), (0.0012, 1000, "a")]
    assert straggler(ranks, elapsed=10.0) == ((1, "b"), 4.0, pytest.approx(0.3))
    assert straggler(ranks[:1], elapsed=10.0)[2] == 0.0
