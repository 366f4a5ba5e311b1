"""Checkpoints: damage is detected, the last good one stays, a full disk is reported."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
from processes import start
from scripts import run_main
from small import small_rows

from kd.recipe import as_flags
from kd.training.checkpoints.checkpoint import (
    checkpoints,
    delete_old,
    lack_of_space,
    usable_checkpoint,
)
from kd.training.checkpoints.manifest import MANIFEST, damage, read_manifest, seal
from kd.training.checkpoints.same_run import check_same_run


def flags(models, output, **changes) -> list[str]:
    """Full training of the small student in one process, with a checkpoint every second step."""
    (models / "rows.jsonl").write_text("\n".join(map(json.dumps, small_rows(24))))
    settings = {
        "student": models / "student",
        "teacher": models / "teacher",
        "data": json.dumps([{"path": str(models / "rows.jsonl")}]),
        "global_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": output,
    } | changes
    return as_flags(settings)


def distill(models, output, **changes) -> None:
    run_main("train/distill.py", *flags(models, output, **changes))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """An uninterrupted run of six steps, under the umask of a team."""
    output = tmp_path_factory.mktemp("saving") / "run"
    command = ["python", "train/distill.py", *flags(models, output)]
    job = start("bash", "-c", 'umask 0007 && "$@"', "_", *command)
    assert (output / "done.json").exists(), job.stdout[-4000:]
    return output


@pytest.fixture
def unfinished(finished, tmp_path):
    """The same run before its end: two checkpoints, no final weights."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "done.json").unlink()
    (output / "model.safetensors").unlink()
    return output


def weights(output) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_a_finished_run_is_not_touched(models, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    distill(models, finished)
    assert "is finished already" in "".join(capsys.readouterr())
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_damage_to_any_single_file_is_detected(finished, tmp_path):
    """Fifty random cases: a file cut, one byte flipped, or deleted; each is undone afterwards."""
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(finished / "checkpoint-6", folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 8 and damage(folder) is None
    draw, missed = random.Random(0), []
    for turn in range(50 + len(files)):  # and every file deleted once
        path = files[turn - 50] if turn >= 50 else draw.choice(files)
        kind = "deleted" if turn >= 50 else draw.choice(["cut", "flipped", "deleted"])
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        if kind == "deleted":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(whole[:place])
        else:
            flipped = bytes([whole[place] ^ (1 << draw.randrange(8))])
            path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        if damage(folder) is None:
            missed.append((path.name, kind, place))
        path.write_bytes(whole)
    assert not missed and damage(folder) is None


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_with_the_same_final_weights(
    models, finished, unfinished, capsys
):
    torn = unfinished / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    (unfinished / "saving-checkpoint-8").mkdir()  # left by a run killed while it wrote
    distill(models, unfinished)
    printed = "".join(capsys.readouterr())
    assert "checkpoint-6: optimizer.pt has" in printed
    assert "set aside as torn-checkpoint-6" in printed
    assert f"resuming from {unfinished}/checkpoint-4" in printed
    assert weights(unfinished) == weights(finished)
    names = sorted(path.name for path in unfinished.glob("*checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-6", "torn-checkpoint-6"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 1e-3}, "learning_rate: found 5e-05, wanted 0.001"),
        ({"max_steps": 9}, "the learning rate of every step depends on the length of the run"),
    ],
)
def test_a_changed_recipe_is_an_error_that_lists_the_differences(
    models, unfinished, change, message
):
    shutil.rmtree(unfinished / "checkpoint-6")  # the run could become longer from its end
    with pytest.raises(ValueError) as error:
        distill(models, unfinished, **change)
    told = str(error.value)
    assert message in told and "checkpoint-4" in told
    assert "Revert them, or use a new output_dir" in told
    record = json.loads((unfinished / "run.json").read_text())
    assert record["recipe"]["learning_rate"] == 5e-5  # it still describes the folder


def test_a_finished_run_goes_on_from_its_end_when_max_steps_is_raised(
    models, finished, tmp_path, capsys
):
    """One step more, which would not train at the rate of 0 with which the shorter run ended."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    distill(models, output, max_steps=7)
    printed = "".join(capsys.readouterr())
    assert f"resuming from {output}/checkpoint-6" in printed
    rate = 5e-5 * (1 - 6 / 7)  # of the linear schedule over seven steps
    assert f"follows the linear schedule of the whole length, {rate:.3g} in" in printed
    assert weights(output) != weights(finished)
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [*range(1, 8)]

    # In the middle of an epoch, Transformers trains one step too many on a resume from the end.
    last = weights(output)
    (output / "done.json").write_text('{"train_loss": 1')  # damaged: not done
    distill(models, output, max_steps=7)
    assert "done.json cannot be read" in "".join(capsys.readouterr())
    assert weights(output) == last and not (output / "checkpoint-8").exists()


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_the_shards_of_zero3_belong_to_one_number_of_processes(stage):
    """Those of ZeRO-2 are cut anew: tests/train/test_elastic.py."""
    recipe = {"seed": 0, "lr_scheduler_type": "linear", "per_device_train_batch_size": 4}
    then = {"processes": 2, "zero_stage": stage, "recipe": recipe}
    now = then | {"processes": 1, "recipe": recipe | {"per_device_train_batch_size": 8}}
    if stage == 3:
        with pytest.raises(ValueError, match="written with processes: 2, but this run has 1"):
            check_same_run("checkpoint-1", then, now)
    else:
        check_same_run("checkpoint-1", then, now)


def test_settings_that_affect_no_weight_may_change(models, finished, unfinished):
    shutil.rmtree(unfinished / "checkpoint-6")
    distill(models, unfinished, save_steps=5, logging_steps=2, dataloader_num_workers=1)
    assert (unfinished / "done.json").exists()
    assert weights(unfinished) == weights(finished)


def test_weights_and_checkpoints_have_the_modes_that_the_umask_allows(finished):
    files = [finished / "model.safetensors", *(finished / "checkpoint-6").rglob("*")]
    assert len(files) > 8
    modes = {path.name: path.stat().st_mode & 0o777 for path in files if path.is_file()}
    assert set(modes.values()) == {0o660}, modes
    assert (finished / "checkpoint-6").stat().st_mode & 0o777 == 0o770


def sealed(output, *steps) -> None:
    for step in steps:
        folder = output / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(1000))
        seal(folder, {"step": step})


def test_the_limit_keeps_the_newest_and_the_best_checkpoint(tmp_path):
    sealed(tmp_path, 2, 4, 6, 10)
    for name in ("checkpoint-20", "torn-checkpoint-8"):  # no manifest: incomplete
        (tmp_path / name).mkdir()
    delete_old(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-20", "checkpoint-10", "checkpoint-6", "checkpoint-2"} | {
        "torn-checkpoint-8"
    }
    delete_old(tmp_path, 1, None)
    assert [path.name for path in checkpoints(tmp_path) if read_manifest(path)] == ["checkpoint-10"]
    assert usable_checkpoint(str(tmp_path)) == (str(tmp_path / "checkpoint-10"), {"step": 10})
    assert (tmp_path / "torn-checkpoint-20").is_dir()


def test_a_manifest_covers_itself(tmp_path):
    sealed(tmp_path, 2)
    manifest = tmp_path / "checkpoint-2" / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"step": 2', '"step": 3'))
    assert damage(tmp_path / "checkpoint-2") == f"{MANIFEST} is missing, torn or changed"


def test_free_space_is_checked_before_anything_is_written(tmp_path):
    sealed(tmp_path, 2)
    assert lack_of_space(tmp_path, 1000) is None
    problem = lack_of_space(tmp_path, 10**18)
    assert (
        "wanted 1,200,000,000,000 MB" in problem
        and "last good checkpoint is checkpoint-2" in problem
    )


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="only root can mount a small disk")
def test_a_full_disk_is_reported_and_leaves_the_last_good_checkpoint(models, tmp_path):
    """A real disk that holds two checkpoints but not three: the third one is written first."""
    output = tmp_path / "run"
    output.mkdir()
    command = [sys.executable, "train/distill.py", *flags(models, output)]
    script = 'mount -t tmpfs -o size="$0" none "$1" && shift && "$@"; rc=$?; ls -R "$OUT"; exit $rc'
    job = start("unshare", "-m", "bash", "-c", script, "1200k", output, *command, OUT=str(output))
    assert job.returncode == 2, job.stdout[-3000:]
    assert "the last good checkpoint is checkpoint-4" in job.stdout, job.stdout[-3000:]
    assert "saving-checkpoint" not in job.stdout.split("error:")[1]
