"""Every recipe parses on every launch file, and launch files only start processes."""

import shlex
from pathlib import Path

import pytest
import yaml
from command_lines import parse_only
from processes import ROOT, start, succeed

from kd.settings.machine_file import FOLDER, machine_file_for, read_machine_file
from kd.settings.training import TrainingSettings

PROFILES = ("cpu", "2xt4", "2xa100", "h100")
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
SCRIPT = "train/distill.py"
MADE = "runs/"


def script_of(recipe: Path) -> str:
    keys = yaml.safe_load((ROOT / recipe).read_text())
    scripts = {"prompts": "generate", "parent": "inherit", "teacher": "distill", "data": "sft"}
    return f"train/{next(script for key, script in scripts.items() if key in keys)}.py"


def dry_run(profile: str, *arguments, **env) -> list[str]:
    return shlex.split(succeed(f"launch/{profile}.sh", "--dry-run", *arguments, **env))


def config_of(command: list[str]) -> dict:
    return yaml.safe_load((ROOT / command[command.index("--config_file") + 1]).read_text())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_recipe_parses_on_every_profile(recipe, profile, monkeypatch):
    script = script_of(recipe)
    command = dry_run(profile, script, "--config", recipe)
    monkeypatch.setenv("WORLD_SIZE", str(config_of(command)["num_processes"]))
    # The models and rows that earlier stages would have made are not here.
    monkeypatch.setattr("kd.settings.model_paths.check_path", lambda key, path: None)
    monkeypatch.setattr("kd.data.sources.will_exist", lambda path: path.startswith(MADE))
    parsed = parse_only(script, command[command.index(script) + 1 :], settings=True)
    training = [part for part in parsed if isinstance(part, TrainingSettings)]
    wanted = yaml.safe_load((ROOT / recipe).read_text()).get("global_batch_size")
    assert [part.global_batch_size for part in training] == [wanted] * len(training)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_launch_file_adds_no_flag_to_the_script(profile):
    """The script chooses for the devices that it finds, so every road gives the same run."""
    command = dry_run(profile, SCRIPT, "--seed", 1)
    assert command[command.index(SCRIPT) :] == [SCRIPT, "--seed", "1"]
    twin = dry_run(profile, "--torchrun", SCRIPT, "--seed", 1)
    processes = str(config_of(command)["num_processes"])
    assert twin == [
        "torchrun",
        "--nproc-per-node",
        processes,
        "--standalone",
        SCRIPT,
        "--seed",
        "1",
    ]
    assert command[command.index("--num_processes") + 1] == processes
    rehearsal = dry_run(profile, "--cpu", SCRIPT)
    assert config_of(rehearsal) == yaml.safe_load(
        (ROOT / "accelerate_configs/cpu.yaml").read_text()
    )
    machine = rehearsal[rehearsal.index("--machine") + 1]
    assert read_machine_file(machine).name == machine


def test_nodes_are_counted_in_both_launchers():
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "2"}
    words = " ".join(dry_run("2xa100", SCRIPT, **nodes))
    wanted = "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip a"
    assert f"{wanted} --main_process_port 2 {SCRIPT}" in words
    words = " ".join(dry_run("2xa100", "--torchrun", SCRIPT, **nodes))
    wanted = "torchrun --nproc-per-node 2 --nnodes 2 --node-rank 1 --master-addr a --master-port 2"
    assert words == f"{wanted} {SCRIPT}"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (None, "cpu"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 3090", "none"),
        ("NVIDIA T400 4GB", "none"),
    ],
)
def test_the_machine_file_is_found_by_the_name_of_the_device(device, name):
    assert machine_file_for(device).name == name


def test_machine_files_have_known_keys_and_files_that_exist(tmp_path):
    for path in FOLDER.glob("*.yaml"):
        keys = read_machine_file(path.stem).preferences.given
        assert all((ROOT / value).is_file() for key, value in keys.items() if "deepspeed" in key)
    (tmp_path / "mine.yaml").write_text("gpu: L4\nram: 2\nprecision: fp8\ntflops: -1\n")
    with pytest.raises(ValueError) as caught:
        read_machine_file(str(tmp_path / "mine.yaml"))
    wanted = [
        "unknown key ram",
        "'fp8'; wanted one of bfloat16",
        "tflops: -1.0; wanted more than 0",
    ]
    assert all(part in str(caught.value) for part in wanted)
    with pytest.raises(ValueError, match="machine: no file l4; wanted .* a100, cpu, h100, t4"):
        read_machine_file("l4")


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
        named = [word for word in words if word.endswith(".py") or "configs/" in word]
        assert named and all(Path(word).is_file() for word in named), words
    board = succeed("bash", "-c", f"cd {tmp_path} && {ROOT}/launch/tensorboard.sh --version")
    assert "no folder" not in board


def test_plan_from_another_folder_reads_the_files_of_the_repository(models, tmp_path):
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
