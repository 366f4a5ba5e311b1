"""The small variants of the experiments through the real command line, and every profile's rehearsal."""

import json
import re
import shutil

import pytest
from processes import ROOT, start, succeed

DATA = ROOT / "runs" / "quickstart" / "data"
SMALL = ROOT / "runs" / "small"


@pytest.fixture(scope="module", autouse=True)
def docstrings():
    """The rows that the small recipes name, as the quickstart makes them."""
    if not (DATA / "chat_heldout.jsonl").exists():
        succeed("python", "-m", "kd.data.docstrings", "--out_dir", DATA)


def run(profile: str, script: str, recipe: str, *flags) -> str:
    """Standard output and error of a small recipe that must end with its done marker."""
    job = start(f"launch/{profile}.sh", f"train/{script}.py", "--config", recipe, *flags)
    assert f"saved to runs/small/{recipe.split('/')[-1][:-5]}" in job.stdout, job.stdout[-6000:]
    return job.stdout


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"'loss': '([^']+)'", printed)]


def test_experiment_a_teacher_then_answers_then_student():
    shutil.rmtree(SMALL, ignore_errors=True)
    printed = run("cpu", "sft", "recipes/small/a_teacher.yaml")
    assert "rows: 128 read, 128 kept" in printed and losses(printed)
    run("cpu", "generate", "recipes/small/a_answers.yaml")
    rows = (SMALL / "a_answers" / "train.jsonl").read_text()
    assert "You are a careful expert" not in rows and len(rows.splitlines()) > 1
    assert "You are a careful expert" in (SMALL / "a_answers" / "run.json").read_text()
    run("cpu", "sft", "recipes/small/a_student.yaml", "--global_batch_size", "2")


@pytest.mark.parametrize("student", ["sft", "distill", "distill_sft"])
def test_experiment_d_three_students_with_the_teacher_in_the_step(student):
    script = "sft" if student == "sft" else "distill"
    shutil.rmtree(SMALL / f"d_{student}", ignore_errors=True)
    printed = run("cpu", script, f"recipes/small/d_{student}.yaml")
    assert "rows a step: 16 = 2 processes x 8 rows x 1" in printed
    assert "<|im_start|>, <|im_end|> look untrained" in printed  # and LoRA leaves them so
    steps = losses(printed)
    assert steps[-1] < steps[0]
    if student != "sft":
        assert "streaming the teacher" in printed and "'divergence'" in printed


@pytest.mark.parametrize("profile", ["2xt4", "2xa100", "h100"])
def test_every_profile_runs_two_steps_with_counts_and_precision_replaced(profile):
    shutil.rmtree(SMALL / "d_distill_sft", ignore_errors=True)
    job = start(
        *(f"launch/{profile}.sh", "--cpu", "train/distill.py"),
        *("--config", "recipes/small/d_distill_sft.yaml", "--max_steps", "2"),
    )
    done = json.loads((SMALL / "d_distill_sft" / "done.json").read_text())
    assert done["train_loss"] > 0.0, job.stdout[-6000:]
    assert "= 2 processes x" in job.stdout
    assert ("streaming the teacher" in job.stdout) == (profile != "h100")
