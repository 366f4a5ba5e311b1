"""train/distill.py with a teacher that has another tokenizer."""

import json
import re
import shutil

import pytest
import torch
from processes import ROOT, start, succeed
from small import TEXT, save_small, small_rows, small_tokenizer
from small_tokenizers import permuted
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.recipe import as_flags

NAMES = ("loss", "divergence", "cross_entropy", "teacher_entropy", "top1_agreement", "grad_norm")


@pytest.fixture(scope="module")
def work(models):
    (models / "aligned.jsonl").write_text("\n".join(map(json.dumps, small_rows(17))))
    other = small_tokenizer(420, TEXT * 2 + ["the list of the names in order"] * 3)
    save_small(models / "other", other, hidden=48, seed=1, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(models / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    renamed = permuted(tokenizer)
    names = renamed.convert_ids_to_tokens(range(len(renamed)))
    order = torch.tensor(tokenizer.convert_tokens_to_ids(names))
    with torch.no_grad():
        for layer in (teacher.get_input_embeddings(), teacher.get_output_embeddings()):
            layer.weight[: len(order)] = layer.weight[order].clone()
    teacher.save_pretrained(models / "permuted")
    renamed.save_pretrained(models / "permuted")
    return models


def run(command: list[str], work, output, **changes) -> tuple[list[list[float]], str]:
    """Return (the metrics of every step, the printed text)."""
    flags = {
        "student": work / "student",
        "data": json.dumps([{"path": str(work / "aligned.jsonl")}]),
        "data_cache": work / "cache",
        "lora_rank": 4,
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 3,
        "soft_weight": 0.7,
        "temperature": 2.0,
        "use_cpu": "true",
        "output_dir": output,
    } | changes
    job = start(*command, "train/distill.py", *as_flags(flags))
    assert (output / "done.json").exists(), job.stdout[-6000:]
    state = json.loads((output / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    return [[entry[name] for name in NAMES] for entry in steps], job.stdout


def test_the_same_tokens_under_other_ids_train_as_with_the_ordinary_loss(work, tmp_path):
    wanted, _ = run(["python"], work, tmp_path / "plain", teacher=work / "teacher")
    found, printed = run(
        ["python"], work, tmp_path / "ids", teacher=work / "permuted", align_tokenizers="true"
    )
    assert "320 tokens map one to one; the student has 320, the teacher 320" in printed
    assert "alignment: 100.0% of the targets equal one teacher token" in printed
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][0], wanted[0][0], rtol=1e-6, atol=0)


@pytest.mark.slow
def test_two_ranks_with_a_sharded_teacher_train_as_one_process_with_a_whole_one(work, tmp_path):
    """The student is sharded too. The last step of an epoch has one row, for one of the ranks."""
    settings = {"teacher": work / "other", "align_tokenizers": "true"}
    wanted, printed = run(["python"], work, tmp_path / "one", **settings)
    assert "tokens map one to one; the student has 320, the teacher" in printed
    assert "of the targets equal one teacher token" in printed
    settings["deepspeed"] = "ds_configs/student_zero3.json"
    found, printed = run(["launch/cpu.sh"], work, tmp_path / "two", **settings)
    assert "teacher (1/2 per process)" in printed and "student's gathered layers" in printed
    assert "= 2 processes x 2 rows x 2" in printed
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    assert wanted[-1][0] < wanted[0][0]


@pytest.mark.slow
def test_the_small_recipe_runs_as_its_header_says(docstrings):
    for name in ("g_start", "g_distill"):
        shutil.rmtree(ROOT / "runs/small" / name, ignore_errors=True)
    succeed("python", "benchmarks/other_tokenizer.py", "--start", "runs/small/g_start")
    recipe = "recipes/small/g_distill.yaml"
    job = start("launch/cpu.sh", "train/distill.py", "--config", recipe)
    assert "saved to runs/small/g_distill" in job.stdout, job.stdout[-6000:]
    assert "the student has 2048, the teacher 4096" in job.stdout
    share = re.search(r"([\d.]+)% are compared with the teacher", job.stdout)
    assert float(share.group(1)) > 95.0
