"""A user's mistake ends the real command line with the reason, before a model is loaded."""

import json
import shutil

import pytest
from processes import start
from small import save_small, small_tokenizer


@pytest.fixture(scope="module")
def work(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    save_small(folder / "other", small_tokenizer(330))
    good = {"prompt": "a", "completion": "b"}
    (folder / "rows.jsonl").write_text(json.dumps(good) + "\n")
    (folder / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({"answer": 1}) + "\n")
    for name in ("student", "teacher"):  # everything except the weights
        (folder / name).mkdir()
        for file in (models / name).iterdir():
            if file.suffix != ".safetensors":
                (folder / name / file.name).write_bytes(file.read_bytes())
    shutil.copytree(folder / "teacher", folder / "packed")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 8, "group_size": 128}
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "teacher")}
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


MISTAKES = {
    "unknown key": (
        ["--learning_rat", "1"],
        "unknown key learning_rat; did you mean learning_rate",
    ),
    "missing data": (["--data", '[{"path": "no.jsonl"}]'], "no file no.jsonl"),
    "row without fields": (["--data", '[{"path": "WORK/bad.jsonl"}]'], "bad.jsonl, line 2: fields"),
    "other tokenizer": (["--teacher", "WORK/other"], "set align_tokenizers: true"),
    "aligned cache": (
        ["--align_tokenizers", "true", "--teacher_cache", "WORK/cache"],
        "align_tokenizers: true with teacher_cache",
    ),
    "aligned hidden states": (
        ["--align_tokenizers", "true", "--hidden_weight", "1"],
        "align_tokenizers: true with hidden_weight",
    ),
    "aligned on-policy": (
        ["--align_tokenizers", "true", "--student_fraction", "0.5"],
        "with align_tokenizers: generated text cannot be aligned in advance",
    ),
    "aligned to itself": (
        ["--align_tokenizers", "true", "--teacher", "self", "--lora_rank", "2"],
        "align_tokenizers: true with teacher: self",
    ),
    "batch": (["--per_device_train_batch_size", "3"], "3 does not divide the 8 rows per process"),
    "no launcher": (["--teacher_deepspeed", "ds_configs/teacher_zero3.json"], "without a launcher"),
    "teacher's format": (["--teacher", "WORK/packed"], "AWQ with {'bits': 8"),
    "layer": (["--hidden_weight", "1", "--hidden_layers", "2:9"], "the teacher 0 to 2"),
    "no adapters": (["--teacher", "self"], "teacher: self is the student without its adapters"),
    "sharded adapter": (
        ["--teacher", "WORK/adapter", "--teacher_deepspeed", "ds_configs/teacher_zero3.json"],
        "merge it first: python train/merge.py --adapter",
    ),
    "on-policy, packed": (
        ["--student_fraction", "0.5", "--packing", "true"],
        "a packed row has no room for it; set packing: false",
    ),
    "on-policy, cached teacher": (
        ["--student_fraction", "0.5", "--teacher_cache", "WORK"],
        "remove teacher_cache, so that the teacher runs in every step",
    ),
    "half weights": (["--dtype", "bfloat16"], "set dtype: float32"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_before_a_model_is_loaded(work, mistake):
    flags, message = MISTAKES[mistake]
    data = json.dumps([{"path": str(work / "rows.jsonl")}])
    done = start(
        *("python", "train/distill.py", "--student", work / "student", "--use_cpu", "true"),
        *("--teacher", work / "teacher", "--data", data, "--global_batch_size", "8"),
        *("--output_dir", work / "out"),
        *(flag.replace("WORK", str(work)) for flag in flags),
    )
    assert done.returncode == 2, done.stdout
    assert "error: " in done.stdout and message in done.stdout
    assert "Traceback" not in done.stdout and not (work / "out" / "done.json").exists()


def test_fine_tuning_has_no_on_policy_rows(work):
    done = start("python", "train/sft.py", "--student_fraction", "0.5")
    assert done.returncode == 2 and "unknown key student_fraction" in done.stdout, done.stdout


def test_the_same_command_without_a_mistake_looks_for_weights(work):
    """The errors above therefore came before the models, not instead of them."""
    data = json.dumps([{"path": str(work / "rows.jsonl")}])
    done = start(
        *("python", "train/distill.py", "--student", work / "student", "--use_cpu", "true"),
        *("--teacher", work / "teacher", "--data", data, "--global_batch_size", "8"),
        *("--output_dir", work / "out"),
    )
    assert "no file named model.safetensors" in done.stdout, done.stdout
