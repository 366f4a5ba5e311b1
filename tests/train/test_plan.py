"""train/plan.py: every recipe on every profile, and the plan at the start of a run."""

import functools
import json
import re
import shlex
import sys

import pytest
import yaml
from processes import ROOT, succeed
from published import SHAPES, save_config
from scripts import run_main
from small import save_small

from kd.planning.layout import SPARE

PROFILES = ("cpu", "2xt4", "2xa100", "h100")
RECIPES = [
    path.relative_to(ROOT)
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if {"model", "student"} & (keys := yaml.safe_load(path.read_text())).keys() and "data" in keys
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders with the configurations of the models from the hub."""
    folder = tmp_path_factory.mktemp("hub")
    return {name: save_config(folder / name.split("/")[1], name) for name in SHAPES}


def with_local_models(recipe, hub) -> list[str]:
    """Flags that replace every model that is not present by a local folder."""
    keys, flags = yaml.safe_load((ROOT / recipe).read_text()), []
    for key in ("model", "student", "teacher"):
        name = keys.get(key)
        if name is None or (ROOT / name).is_dir():
            continue
        made = "data/quickstart/student" if key == "student" else "data/quickstart/teacher"
        flags += [f"--{key}", str(hub.get(name, made))]
    return flags


@functools.cache
def printed_command(profile: str) -> list[str]:
    """The command that a profile prints for WORDS."""
    return shlex.split(succeed(f"launch/{profile}.sh", "--dry-run", "train/plan.py", "WORDS"))


def plan_script() -> dict:
    names: dict = {"__name__": "planned"}
    exec(compile((ROOT / "train/plan.py").read_text(), "train/plan.py", "exec"), names)
    return names


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_has_a_plan_on_every_profile(recipe, profile, hub, tmp_path, monkeypatch):
    """The command that the profile prints, run in this process."""
    file, flags = tmp_path / "plan.json", with_local_models(recipe, hub)
    rates = ["--tflops", "1", "--memory_gb_s", "10"]  # otherwise the CPU would be measured
    words = ["--config", str(recipe), *flags, "--rows", "1000", *rates, "--json", str(file)]
    python, script, *flags_of_profile, last = printed_command(profile)
    assert [python, script, last] == ["python", "train/plan.py", "WORDS"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *flags_of_profile, *words])
    try:
        plan_script()["main"]()
    except ValueError as error:  # D on T4s, E on one GPU or on T4s, both on a small computer
        assert "DOES NOT FIT" in str(error)
        too_small = {"d_qwen1.5_32b_to_14b": "cpu 2xt4", "e_llama3_8b_gpt4o": "cpu 2xt4 h100"}
        assert profile in too_small[recipe.parent.name].split()
        return
    plan = json.loads(file.read_text())
    assert plan["processes"] == (1 if profile == "h100" else 2)
    rows = plan["processes"] * plan["rows"] * plan["accumulation"]
    assert rows == yaml.safe_load((ROOT / recipe).read_text())["global_batch_size"]
    assert 0 < plan["total"] <= plan["of"]


def test_planning_for_a_profile_needs_none_of_its_gpus_and_prints_once(hub):
    printed = succeed(
        *("launch/2xa100.sh", "train/plan.py"),
        *("--config", "recipes/d_qwen1.5_32b_to_14b/distill.yaml"),
        *("--student", hub["Qwen/Qwen1.5-14B"]),
        *("--teacher", hub["Qwen/Qwen1.5-32B-Chat-AWQ"]),
        *("--rows", "207865", "--gpu_memory_gb", "39.4"),
    )
    assert printed.count("peak memory per GPU") == 1
    table = printed.split("time per step")[0]
    assert "teacher (1/2 per process)" in table and "fits" in table and "NOT FIT" not in table
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB$", table, flags=re.M)]
    *parts, total, _ = sizes  # the last line is host memory
    assert sum(parts) == pytest.approx(total, abs=0.06)
    assert "steps" in printed and "hours" in printed and "2 checkpoints" in printed


def test_the_number_of_processes_can_be_overridden(hub):
    command = succeed("launch/h100.sh", "--dry-run", "train/plan.py", NUM_PROCESSES="8")
    assert "--num_processes 8" in command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    save_small(folder / "model")
    rows = [{"prompt": "Say something.", "completion": "word " * 600}] * 64
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags_of(work, *flags) -> list[str]:
    """The flags that train/sft.py and train/plan.py share."""
    data = json.dumps([{"path": str(work / "rows.jsonl")}])
    words = ("--model", work / "model", "--data", data, "--max_length", "512", "--use_cpu", "true")
    words += ("--max_per_device_train_batch_size", "16")
    words += () if "--global_batch_size" in flags else ("--global_batch_size", "16")
    place = () if "--output_dir" in flags else ("--output_dir", work / "out")
    return [str(word) for word in (*words, *place, *flags)]


def planned_gib(work, monkeypatch, *flags) -> float:
    rates = ("--tflops", "1", "--memory_gb_s", "10", "--json", work / "plan.json")
    monkeypatch.setattr(sys, "argv", ["train/plan.py", *flags_of(work, *rates, *flags)])
    plan_script()["main"]()
    return json.loads((work / "plan.json").read_text())["total"] / 2**30


def test_host_memory_is_that_of_one_machine(work, monkeypatch):
    hosts = []
    for machines in (1, 2, 4):
        flags = ("--num_machines", machines, "--num_processes", 2 * machines)
        planned_gib(work, monkeypatch, *flags)
        hosts.append(json.loads((work / "plan.json").read_text())["host"])
    assert hosts[0] == hosts[1] == hosts[2] and hosts[0]["libraries"] == 2 * 2.5 * 2**30


def test_a_run_uses_the_micro_batch_of_its_plan_and_records_it(work, monkeypatch, capsys):
    memory = planned_gib(work, monkeypatch) / (1 - SPARE) - 1e-5
    flags = flags_of(work, "--max_steps", "1", "--save_strategy", "no", "--gpu_memory_gb", memory)
    run_main("train/sft.py", *flags)
    printed = capsys.readouterr().out
    record = json.loads((work / "out" / "run.json").read_text())
    plan = record["plan"]
    assert (plan["rows"], plan["accumulation"]) == (8, 2)
    assert record["recipe"]["per_device_train_batch_size"] == 8
    assert "rows per step: 16 = 1 processes x 8 rows x 2" in printed
    assert (
        "peak memory per process" in printed and plan["total"] <= plan["of"] <= memory * 2**30 + 1
    )


def test_a_run_that_cannot_fit_stops_before_a_model_is_loaded(work, monkeypatch, capsys):
    batch = ("--global_batch_size", "64", "--per_device_train_batch_size", "64")
    memory = planned_gib(work, monkeypatch, *batch) - 1e-5
    flags = flags_of(work, *batch, "--gpu_memory_gb", memory, "--output_dir", work / "stopped")
    with pytest.raises(ValueError, match="DOES NOT FIT") as error:
        run_main("train/sft.py", *flags)
    printed = "".join(capsys.readouterr()) + str(error.value)
    assert printed.count("rows per micro-batch)") == 3
    assert "parameters:" not in printed
