"""Every mistake of the table ends with its one line, before weights are read, and loses nothing."""

import hashlib
from pathlib import Path

import pytest
from mistakes import evaluation, models, rows, runs, settings
from mistakes.frame import Case, command_line, make_work
from processes import start
from scripts import run_main

CASES = [case for area in (models, settings, rows, runs, evaluation) for case in area.CASES]


@pytest.fixture(scope="module")
def work(request, tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"), request.getfixturevalue("models"))


def digests(folder: Path) -> dict[Path, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)), sorted({x for x in names if names.count(x) > 1})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_one_line(case: Case, work, tmp_path):
    tokens = command_line(case, work, tmp_path)
    before = digests(tmp_path)
    with pytest.raises(ValueError) as raised:
        run_main(case.script, *tokens)
    message = str(raised.value)
    assert case.message.replace("WORK", str(work)).replace("HERE", str(tmp_path)) in message
    assert len(message.splitlines()) == case.lines, message
    after = digests(tmp_path)
    assert {file: after.get(file) for file in before} == before  # no file of the user has changed
    assert not [file for file in after.keys() - before if file.name == "done.json"]


def test_a_process_exits_with_code_2_and_with_a_traceback_only_on_request(work, tmp_path):
    """What `run_main` cannot show: kd.run.exit prints the error and chooses the exit code."""
    case = next(case for case in CASES if case.name == "unknown key")
    done = start("python", case.script, *command_line(case, work, tmp_path))
    assert done.returncode == 2, done.stdout
    assert "error: " in done.stdout and case.message in done.stdout
    assert "Traceback" not in done.stdout
    secret = {"KD_TRACEBACK": "1", "SERVER_KEY": "the-key-of-the-server"}
    shown = start("python", case.script, "--the-key-of-the-server", "1", **secret)
    assert shown.returncode == 2 and "Traceback" in shown.stdout and "error: " in shown.stdout
    assert "***" in shown.stdout and secret["SERVER_KEY"] not in shown.stdout


def test_a_command_without_a_mistake_looks_for_weights(work, tmp_path):
    """The errors above therefore came before the models, not instead of them."""
    good = Case("none", "train/distill.py", "")
    with pytest.raises((ValueError, OSError), match="no file named model.safetensors"):
        run_main(good.script, *command_line(good, work, tmp_path))
