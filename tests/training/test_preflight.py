"""What a run needs around it is checked before any weights are read."""

import shutil
from collections import namedtuple

import pytest
from mistakes.frame import Case, command_line, make_work
from scripts import run_main

from kd.planning.disk import checkpoint_bytes
from kd.training import preflight, recipe_checks
from kd.training.preflight import lack_of_disk

Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_for_two_checkpoints_is_told_before_models_load(
    models, tmp_path, monkeypatch
):
    work = make_work(tmp_path / "work", models)
    sizes = []

    def record(layout):
        sizes.append(checkpoint_bytes(layout))
        return sizes[-1]

    monkeypatch.setattr(recipe_checks, "checkpoint_bytes", record)
    usage = shutil.disk_usage
    for free, message in ((10**12, "no file named model.safetensors"), (1000, "0.0 MB free")):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, f=free: Usage(f, 0, f))
        with pytest.raises((ValueError, OSError), match=message):
            run_main("train/sft.py", *command_line(Case("", "train/sft.py", ""), work, tmp_path))
    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    checkpoint, model = sizes[-1]
    weights = (models / "student" / "model.safetensors").stat().st_size
    assert abs(model - weights) < 0.2 * weights  # float32, as the student is stored
    assert checkpoint >= 3 * model  # with Adam's two moments


@pytest.mark.parametrize(
    "free, present, fits",
    [(25, 0, True), (24, 0, False), (15, 1, True), (14, 1, False), (5, 3, True)],
)
def test_checkpoints_that_exist_need_no_room(tmp_path, monkeypatch, free, present, fits):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(free, 0, free))
    problem = lack_of_disk(str(tmp_path), checkpoint=10.0, model=5.0, present=present)
    assert (problem is None) == fits
