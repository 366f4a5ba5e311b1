"""The flagship, small: a four-bit teacher over two processes beside a QLoRA student under ZeRO-2."""

import json

from processes import ROOT, start
from small import small_rows

from kd.models.awq_writer import WriterSettings, write


def losses(output) -> list[float]:
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_an_awq_teacher_sharded_by_zero3_gives_the_losses_of_the_unsharded_one(models, tmp_path):
    write(WriterSettings(str(models / "teacher"), str(tmp_path / "awq"), group_size=16))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(24))))
    flags = {
        "student": models / "student",
        "teacher": tmp_path / "awq",
        "quantization": "nf4",
        "lora_rank": 4,
        "data": json.dumps([{"path": str(tmp_path / "rows.jsonl")}]),
        "soft_weight": 0.7,
        "global_batch_size": 8,
        "max_per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "num_train_epochs": 2,
    }
    spelt = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
    script = ["train/distill.py", "--use_cpu", "true", *spelt, "--output_dir"]
    shards = json.loads((ROOT / "ds_configs" / "teacher_zero3.json").read_text())
    shards["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # all tensors are small
    (tmp_path / "shards.json").write_text(json.dumps(shards))
    sharded = [tmp_path / "sharded", "--teacher_deepspeed", tmp_path / "shards.json"]
    # The launch profile without its flag that shards the teacher.
    alone = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml"]
    jobs = {
        "sharded": start("launch/cpu.sh", *script, *sharded),
        "whole": start(*alone, "--main_process_port", "0", *script, tmp_path / "whole"),
    }
    for name, job in jobs.items():
        assert (tmp_path / name / "done.json").exists(), job.stdout[-6000:]
    assert losses(tmp_path / "sharded") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6
    recipes = [json.loads((tmp_path / name / "run.json").read_text())["recipe"] for name in jobs]
    assert [bool(recipe["teacher_deepspeed"]) for recipe in recipes] == [True, False]
    assert all(recipe["gradient_accumulation_steps"] == 2 for recipe in recipes)
