"""Every recipe parses on every launch profile, and its batch divides."""

import shlex
from pathlib import Path

import pytest
import yaml
from command_lines import parse_only
from processes import ROOT, start, succeed

from kd.settings.training import TrainingSettings

PROFILES = ("cpu", "2xt4", "2xa100", "h100")
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))


def script_of(recipe: Path) -> str:
    keys = yaml.safe_load((ROOT / recipe).read_text())
    scripts = {"prompts": "generate", "parent": "inherit", "teacher": "distill", "data": "sft"}
    return f"train/{next(script for key, script in scripts.items() if key in keys)}.py"


def dry_run(profile: str, *arguments) -> list[str]:
    return shlex.split(succeed(f"launch/{profile}.sh", "--dry-run", *arguments))


@pytest.mark.usefixtures("docstrings")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_parses_on_every_profile(recipe, profile, monkeypatch):
    script = script_of(recipe)
    command = dry_run(profile, script, "--config", recipe)
    config = yaml.safe_load((ROOT / command[command.index("--config_file") + 1]).read_text())
    assert (ROOT / config["deepspeed_config"]["deepspeed_config_file"]).is_file()
    monkeypatch.setenv("WORLD_SIZE", str(config["num_processes"]))
    # The models that earlier stages would have made are not here.
    monkeypatch.setattr("kd.settings.model_paths.check_path", lambda key, path: None)
    parsed = parse_only(script, command[command.index(script) + 1 :], settings=True)
    training = [part for part in parsed if isinstance(part, TrainingSettings)]
    wanted = yaml.safe_load((ROOT / recipe).read_text()).get("global_batch_size")
    assert [part.global_batch_size for part in training] == [wanted] * len(training)


def test_command_line_flags_follow_those_of_the_profile_and_override_them():
    command = dry_run("2xa100", "train/sft.py", "--config", "x.yaml", "--bf16", "false")
    assert command.index("--bf16") < command.index("--profile_end") < command.index("--config")
    assert command[-2:] == ["--bf16", "false"]


def test_only_distillation_gets_the_teachers_flags():
    assert "--teacher_deepspeed" in dry_run("2xa100", "train/distill.py")
    assert "--teacher_deepspeed" not in dry_run("2xa100", "train/sft.py")
    assert dry_run("2xa100", "train/generate.py")[-1] == "train/generate.py"
    # A T4 has no bfloat16.
    assert dry_run("2xt4", "train/generate.py")[-3:-1] == ["--dtype", "float16"]


@pytest.mark.parametrize("profile", PROFILES)
def test_torchrun_starts_the_same_run(profile):
    """With as many processes, the same DeepSpeed JSON and the same flags."""
    script = "train/distill.py"
    first = dry_run(profile, script, "--seed", 1)
    twin = dry_run(profile, "--torchrun", script, "--seed", 1)
    config = yaml.safe_load((ROOT / first[first.index("--config_file") + 1]).read_text())
    assert twin[:3] == ["torchrun", "--nproc-per-node", str(config["num_processes"])]
    at = twin.index("--deepspeed")
    assert twin[at + 1] == str(ROOT / config["deepspeed_config"]["deepspeed_config_file"])
    assert first[first.index("--deepspeed_config_file") + 1] == twin[at + 1]
    assert twin[twin.index(script) : at] + twin[at + 2 :] == first[first.index(script) :]


def test_launch_files_keep_the_folder_of_the_caller(tmp_path):
    """Flags keep their relative paths, and the script and configurations are the repository's."""
    starts = {
        "train/plan.py": "--student mine --config recipe.yaml",
        "eval/report.py": "--out x.md",
    }
    (tmp_path / "runs").mkdir()
    for script, flags in starts.items():
        command = shlex.join([str(ROOT / "launch/2xa100.sh"), "--dry-run", script])
        printed = succeed("bash", "-c", f"cd {tmp_path} && {command} {flags}")
        words = shlex.split(printed)
        assert words[-len(flags.split()) :] == flags.split() and str(ROOT / script) in words
        named = [word for word in words if word.endswith((".json", ".py")) or "configs/" in word]
        assert len(named) >= 2 and all(Path(word).is_file() for word in named), words
    board = succeed("bash", "-c", f"cd {tmp_path} && {ROOT}/launch/tensorboard.sh --version")
    assert "no folder" not in board


def test_plan_from_another_folder_reads_the_profile(models, tmp_path):
    """The DeepSpeed configuration that an accelerate configuration names is the repository's."""
    row = tmp_path / "rows.jsonl"
    row.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    flags = f'--model {models}/student --data \'[{{"path": "rows.jsonl"}}]\' --global_batch_size 4'
    command = f"{ROOT}/launch/cpu.sh train/plan.py {flags} --output_dir out"
    assert "(1/2 per process)" in succeed("bash", "-c", f"cd {tmp_path} && {command}")


@pytest.mark.parametrize("arguments", [(), ("train/missing.py",), ("--dryrun", "train/sft.py")])
def test_wrong_call_of_a_profile_prints_its_usage(arguments):
    done = start("launch/cpu.sh", *arguments)
    assert done.returncode == 2 and "SCRIPT" in done.stdout or "wanted" in done.stdout


def test_small_variants_have_the_keys_of_their_recipes():
    for small in (ROOT / "recipes" / "small").glob("*.yaml"):
        text = small.read_text()
        original = text.split("variant of ")[1].split(":")[0]
        keys, wanted = yaml.safe_load(text), yaml.safe_load((ROOT / original).read_text())
        assert keys.keys() == wanted.keys(), small


def test_mixture_of_experiment_a_has_the_reported_counts():
    recipe = yaml.safe_load((ROOT / "recipes/a_qwen2.5_1.5b_to_0.5b/1_teacher.yaml").read_text())
    counts = [source["count"] for source in recipe["data"]]
    assert sum(counts[:2]) == 80_000 and counts[1] == 16_000
    assert counts[2:] == [6000, 1000, 1000, 1000, 1000, 200, 100] and sum(counts[2:]) == 10_300
