"""One parser for recipe files and flags: precedence, validation, and the derived batch."""

from dataclasses import dataclass

import pytest

from kd.recipe import parse, setting
from kd.settings.distillation import (
    DataSettings,
    ModelSettings,
    Objective,
    OnPolicySettings,
    StudentSettings,
)
from kd.settings.teacher import TeacherSettings
from kd.settings.training import derive_batch
from kd.settings.training_recipe import parse_distillation, parse_sft

JSON = "ds_configs/teacher_zero3.json"


@dataclass
class Numbers:
    rate: float = setting(1.0, "a rate")
    count: int = setting(1, "a count")
    names: list[str] | None = setting(None, "names")
    flag: bool = setting(False, "a flag")


def write(tmp_path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def test_command_line_wins_over_recipe_wins_over_default(tmp_path):
    recipe = write(tmp_path, "rate: 2e-5\ncount: 2\n")
    (numbers,) = parse(Numbers, argv=["--config", recipe])
    assert (numbers.rate, numbers.count, numbers.flag) == (2e-5, 2, False)
    (numbers,) = parse(Numbers, argv=[f"--config={recipe}", "--count", "4"])
    assert (numbers.rate, numbers.count) == (2e-5, 4)


def test_yaml_numbers_lists_and_booleans_are_parsed(tmp_path):
    """Scalars are those of YAML 1.2: in 1.1, 1e-4 is a string, 1:30 is 90 and `no` is false."""
    recipe = write(tmp_path, "rate: 1e-4\ncount: 010\nnames: [1:30, no, 1e-4]\nflag: yes\n")
    (numbers,) = parse(Numbers, argv=["--config", recipe])
    assert numbers == Numbers(1e-4, 10, ["1:30", "no", "0.0001"], True)


def test_numbers_inside_the_sources_of_a_recipe_are_numbers(tmp_path):
    sources = "data: [{path: a, weight: 1e-4}, {path: b, weight: 2}]\n"
    (data,) = parse(DataSettings, argv=["--config", write(tmp_path, sources)])
    assert [source["weight"] for source in data.sources] == [1e-4, 2]


def test_negative_numbers_and_switches_without_a_value_are_read_from_the_command_line():
    (numbers,) = parse(Numbers, argv=["--rate", "-1", "--flag", "--count=-2"])
    assert numbers == Numbers(-1.0, -2, None, True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rat: 1", "unknown key rat; did you mean rate"),
        ("count: many", "recipe.yaml: count: 'many'; wanted a whole number"),
        ("count: 1.5", "count: '1.5'; wanted a whole number"),
        ("rate:", "rate is empty"),
        ("count: 1\ncount: 2", "key given twice"),
        ("- a\n- b", "found list; wanted keys and values"),
        ("rate: [1", "recipe.yaml"),
    ],
)
def test_wrong_recipes_are_refused_with_the_reason(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(Numbers, argv=["--config", write(tmp_path, text)])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rat", "1"], "did you mean rate"),
        (["--rate"], "rate: no value given; wanted a number"),
        (["--config", "missing.yaml"], "no file missing.yaml"),
        (["--config"], "no file given"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_refused_with_the_reason(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(Numbers, argv=argv)


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        (ModelSettings, {"quantization": "nf4"}, "set lora_rank"),
        (ModelSettings, {"train_template_tokens": True}, "lora_rank: 0"),
        (ModelSettings, {"chat_template": "no.jinja"}, "no file no.jinja"),
        (Objective, {"soft_weight": 1.5}, "wanted 0 to 1"),
        (Objective, {"temperature": 0.0}, "wanted 0.001 to 1000"),
        (Objective, {"skew": 1.0}, "skew: 1.0; wanted more than 0 and less than 1"),
        (Objective, {"jensen_shannon_weight": 0.0}, "jensen_shannon_weight: 0.0; wanted"),
        (Objective, {"loss_workspace_mb": 16}, "wanted 128 or more"),
        (OnPolicySettings, {"student_fraction": 1.5}, "student_fraction: 1.5; wanted 0 to 1"),
        (OnPolicySettings, {"top_p": 0.0}, "top_p: 0.0; wanted more than 0"),
        (OnPolicySettings, {"max_new_tokens": 0}, "max_new_tokens: 0; wanted 1 or more"),
        (OnPolicySettings, {"generation_temperature": -1.0}, "-1.0; wanted 0 or more"),
        (OnPolicySettings, {"top_k": -1}, "top_k: -1; wanted 0 or more"),
        (OnPolicySettings, {"generation_workspace_mb": 0}, "mb: 0; wanted 1 or more"),
        (StudentSettings, {}, "student: not given"),
        (TeacherSettings, {}, "teacher: not given"),
        (TeacherSettings, {"teacher": "t", "cache_top_k": -1}, "cache_top_k: -1; wanted 0 or"),
        (TeacherSettings, {"teacher": "t", "cache_shard_mb": 0}, "cache_shard_mb: 0; wanted 1 or"),
        (TeacherSettings, {"teacher": "t", "cache_check_tokens": -1}, "-1; wanted 0 or more"),
        (TeacherSettings, {"teacher": "t", "teacher_deepspeed": "no.json"}, "no file no.json"),
        (TeacherSettings, {"teacher": "self", "teacher_deepspeed": JSON}, "no weights of its own"),
        (TeacherSettings, {"teacher": "t", "teacher_workspace_mb": -1}, "mb: -1; wanted 0"),
        (DataSettings, {}, "no source given"),
        (DataSettings, {"data": "rows.jsonl"}, "not JSON"),
        (DataSettings, {"data": "[1]"}, 'such as \\[{"path": "rows.jsonl"}\\]$'),
        (DataSettings, {"data": "null"}, "data: found null; wanted a list of objects"),
        (ModelSettings, {"template_arguments": "null"}, "found null; wanted an object such as"),
        (DataSettings, {"data": "[{path: a}]"}, r"found \[{path: a}\], which is not JSON \(Expec"),
        (DataSettings, {"data": '[{"path": "a"}]', "max_length": 1}, "wanted 2 or more"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_limits_of_allowed_ranges_are_allowed():
    Objective(soft_weight=0.0)
    Objective(soft_weight=1.0, loss_workspace_mb=128)
    OnPolicySettings(student_fraction=1.0, top_p=1.0, top_k=0, generation_temperature=0.0)
    TeacherSettings(teacher="t", cache_top_k=0, cache_check_tokens=0, teacher_workspace_mb=0)
    TeacherSettings(teacher_cache="folder")
    zero3 = "ds_configs/teacher_zero3.json"
    assert TeacherSettings(teacher="t", teacher_deepspeed=zero3).teacher_deepspeed == zero3


@pytest.mark.parametrize(
    "given, expected",
    [
        ((64, 2, 8), (8, 4)),
        ((64, 2, 7), (4, 8)),  # the largest divisor of 32 that is at most 7
        ((6, 2, 8), (3, 1)),
        ((64, 1, 8, 16), (16, 4)),  # given: kept, although over the cap
        ((64, 2, 8, None, 16), (2, 16)),
        ((64, 2, 8, 3, 5), (3, 5)),
    ],
)
def test_micro_batch_is_the_largest_divisor_under_the_cap(given, expected):
    assert derive_batch(*given) == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ((0, 1, 8), "not given"),
        ((10, 4, 8), "does not divide by 4 processes; the nearest that does is 8"),
        ((8, 2, 8, 3), "per_device_train_batch_size: 3 does not divide the 4 rows"),
        ((8, 2, 8, None, 3), "gradient_accumulation_steps: 3 does not divide the 4 rows"),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        derive_batch(*given)


FLAGS = [
    *("--data", '[{"path": "rows.jsonl"}]', "--output_dir", "runs/none", "--use_cpu", "true"),
    *("--global_batch_size", "8"),
]


def test_a_recipe_records_the_keys_of_its_script_and_no_others():
    """Checkpoints compare these records, so a key must not appear or vanish."""
    recipe = parse_sft(argv=["--model", "m", *FLAGS])
    sft = recipe.to_dict()
    assert sft["model"] == "m" and recipe.show_rows == 0
    assert not {"student", "teacher", "soft_weight", "student_fraction", "show_rows"} & sft.keys()
    assert recipe.objective.soft_weight == 0.0 and recipe.model.dtype == "auto"
    recipe = parse_distillation(argv=["--student", "s", "--teacher", "t", *FLAGS])
    distillation = recipe.to_dict()
    assert distillation["student"] == "s" and "model" not in distillation
    assert distillation.keys() - sft.keys() >= {"teacher", "soft_weight", "student_fraction"}


def test_every_weight_in_half_precision_needs_a_float32_copy():
    with pytest.raises(ValueError, match="set dtype: float32"):
        parse_sft(argv=["--model", "m", *FLAGS, "--dtype", "bfloat16"])
    lora = ["--dtype", "bfloat16", "--lora_rank", "4"]
    assert parse_sft(argv=["--model", "m", *FLAGS, *lora]).model.dtype == "bfloat16"
