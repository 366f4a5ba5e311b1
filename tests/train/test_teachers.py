"""Every kind of teacher on the real command line: sharded AWQ, an adapter, the frozen base."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import ROOT, start
from scripts import quantize
from small import small_rows
from transformers import AutoModelForCausalLM

from kd.recipe import as_flags


def figures(output, name: str = "loss") -> list[float]:
    """What was logged of every step."""
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if "loss" in entry]


def arguments(folder, output, **changes) -> list[str]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(24))))
    flags = {
        "data": json.dumps([{"path": str(folder / "rows.jsonl")}]),
        "lora_rank": 4,
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_steps": 3,
        "output_dir": output,
    } | changes
    return ["train/distill.py", "--use_cpu", "true", *as_flags(flags)]


def test_an_awq_teacher_sharded_by_zero3_gives_the_losses_of_the_unsharded_one(models, tmp_path):
    """The main use case, small: a QLoRA student under ZeRO-2 on two processes."""
    quantize(models / "teacher", tmp_path / "awq", 16)
    shards = json.loads((ROOT / "ds_configs" / "teacher_zero3.json").read_text())
    shards["zero_optimization"]["stage3_param_persistence_threshold"] = (
        0  # shard even small tensors
    )
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    settings = {
        "student": models / "student",
        "teacher": tmp_path / "awq",
        "quantization": "nf4",
        "soft_weight": 0.7,
        "max_steps": 6,
    }
    sharded = arguments(tmp_path, tmp_path / "sharded", **settings)
    whole = arguments(tmp_path, tmp_path / "whole", **settings)
    jobs = {
        "sharded": start(
            "launch/cpu.sh", *sharded, "--teacher_deepspeed", tmp_path / "shards.json"
        ),
        "whole": start("launch/cpu.sh", *whole, "--teacher_deepspeed", "none"),
    }
    for name, job in jobs.items():
        assert (tmp_path / name / "done.json").exists(), job.stdout[-6000:]
    assert figures(tmp_path / "sharded") == figures(tmp_path / "whole")
    assert len(figures(tmp_path / "whole")) == 6
    recipes = [json.loads((tmp_path / name / "run.json").read_text())["recipe"] for name in jobs]
    wanted = [str(tmp_path / "shards.json"), "none"]
    assert [recipe["teacher_deepspeed"] for recipe in recipes] == wanted
    assert all(recipe["gradient_accumulation_steps"] == 2 for recipe in recipes)


def test_teacher_self_is_the_student_before_training(models, tmp_path):
    """Two processes, ZeRO-2, 4 bits: the divergence is 0 at the first step and grows."""
    settings = {"student": models / "student", "quantization": "nf4", "soft_weight": 0.1}
    command = arguments(tmp_path, tmp_path / "run", teacher="self", **settings)
    job = start("launch/cpu.sh", *command)
    assert (tmp_path / "run" / "done.json").exists(), job.stdout[-6000:]
    assert "teacher: the student without its adapters" in job.stdout
    first, *later = figures(tmp_path / "run", "divergence")
    assert abs(first) < 1e-6 and all(value > 1e-4 for value in later), (first, later)


@pytest.mark.slow
def test_an_adapter_as_teacher_takes_the_tokenizer_of_its_base(models, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models / "teacher")
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    adapter.save_pretrained(tmp_path / "adapter")
    found = {}
    for name, teacher in (("base", models / "teacher"), ("adapter", tmp_path / "adapter")):
        settings = {"student": models / "student", "teacher": teacher, "hidden_weight": 0.5}
        job = start("python", *arguments(tmp_path, tmp_path / name, **settings))
        assert (tmp_path / name / "done.json").exists(), job.stdout[-6000:]
        found[name] = figures(tmp_path / name, "divergence")[
            0
        ]  # later steps depend on random projections
    assert found["adapter"] == found["base"]  # LoRA's B starts at 0
