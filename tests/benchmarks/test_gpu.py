"""Run benchmarks/gpu.sh without a GPU: states, limits, exit codes, and coverage of GPU tests."""

import json
import os
import runpy
import shlex
import sys

import pytest
import torch
from processes import ROOT, start, succeed

GPU = runpy.run_path(str(ROOT / "benchmarks/gpu.py"))
SETS = GPU["known_parts"]()
PARTS_OF_ALL_SETS = [part for parts in SETS.values() for part in parts]
HUNG = f"6001.{os.getpid()}"  # longer than any timeout of `start`
PARTS = [
    {"name": "fails", "command": ["bash", "-c", "echo why; exit 3"], "limit_s": 60},
    {"name": "hangs", "command": ["bash", "-c", f"sleep {HUNG} & sleep {HUNG}"], "limit_s": 2},
    {"name": "absent", "command": ["/no/such/command"], "limit_s": 60},
    {
        "name": "loss",
        "command": ["bash", "-c", """echo '[{"ours_s": 1.25, "trl_s": null}]' > {metrics}"""],
        "limit_s": 60,
    },
    {"name": "late", "command": ["true"], "limit_s": 60},
]


def files_of(part) -> list[str]:
    """The scripts and test files in the command of a part."""
    words = [word for given in part.command for word in shlex.split(given, comments=False)]
    return [word.strip(";") for word in words if word.strip(";").endswith((".py", ".sh"))]


def gpu_sh(out, *flags, **environment):
    return start("benchmarks/gpu.sh", "--out", out, *flags, WHEELS="/no/wheels", **environment)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple:
    """(exit code, folder, report) of a run in which three parts fail."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "parts.json").write_text(json.dumps(PARTS[:4]))
    done = gpu_sh(folder, "--parts", folder / "parts.json", "--without_gpu")
    return done.returncode, folder, json.loads((folder / "first.json").read_text())


def test_failing_hanging_or_missing_parts_do_not_stop_the_others(report):
    code, _, found = report
    states = {part["name"]: part["state"] for part in found["parts"]}
    assert code == 1
    assert states.pop("absent").startswith("failed: [Errno 2]")
    assert states == {"fails": "failed: exit code 3", "hangs": "stopped after 2 s", "loss": "ok"}
    assert found["parts"][0]["output"] == ["why"]
    assert found["parts"][3]["metrics"] == [{"ours_s": 1.25, "trl_s": None}]
    assert found["machine"]["torch"] == torch.__version__


def test_a_part_that_times_out_is_killed_with_its_children(report):
    for process in os.listdir("/proc"):
        if process.isdigit():
            try:
                command = (ROOT / f"/proc/{process}/cmdline").read_text()
            except OSError:
                continue
            assert command != f"sleep\0{HUNG}\0"


def test_the_table_shows_state_and_metrics_of_every_part(report):
    _, folder, _ = report
    table = (folder / "first.txt").read_text()
    for part in PARTS[:4]:
        assert f"\n{part['name']} " in table
    assert "| ours, s |" in table and "| 1.25 |" in table
    assert "==== fails: failed: exit code 3" in (folder / "first.log").read_text()


def test_no_part_starts_after_the_time_limit(tmp_path):
    (tmp_path / "parts.json").write_text(json.dumps(PARTS[4:]))
    flags = ("--parts", tmp_path / "parts.json", "--without_gpu", "--minutes", 0.1)
    assert gpu_sh(tmp_path, *flags).returncode == 1
    (part,) = json.loads((tmp_path / "first.json").read_text())["parts"]
    assert part["state"] == "not run: no time was left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_part_reports_it(tmp_path):
    assert gpu_sh(tmp_path).returncode == 2
    parts = json.loads((tmp_path / "first.json").read_text())["parts"]
    assert {part["state"] for part in parts} == {"not run: there is no GPU"}
    assert {"tests", "step", "loss"} <= {part["name"] for part in parts}


@pytest.mark.slow
def test_every_gpu_test_is_included():
    (command,) = (part.command for part in SETS["first"] if part.name == "tests")
    assert command[command.index("gpu") - 1] == "-m"
    output = succeed(
        *(sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "tests"),
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
    )
    every = [line for line in output.splitlines() if "::" in line]
    assert len(every) > 60 and {test.split("::")[0] for test in every} <= set(command)


def test_every_part_calls_an_existing_file():
    dry = succeed("python", "benchmarks/gpu.py", "--set", "second", "--dry_run").splitlines()
    assert [line.split(",")[0] for line in dry[:1]] == ["step"] and len(dry) == len(SETS["second"])
    for part in PARTS_OF_ALL_SETS:
        paths = files_of(part)
        assert paths and all((ROOT / path).exists() for path in paths), part


@pytest.mark.parametrize("name", SETS)
def test_the_limits_of_a_set_fit_its_time(name):
    """Of the nine minutes, installing the wheels takes some seconds."""
    parts = SETS[name]
    assert sum(part.limit_s for part in parts) <= 540 - 30
    assert len({part.name for part in PARTS_OF_ALL_SETS}) == len(PARTS_OF_ALL_SETS)


def test_pytest_output_is_counted_and_failures_are_named():
    """This holds for truncated lines, and for names that contain a space."""
    count = GPU["count_tests"]
    printed = (
        "tests/a/test_a.py::test_x PASSED   [ 10%]\n"
        "tests/a/test_a.py::test_y[a b-1] FAILED   [ 20%]\n"
        "tests/a/test_a.py::test_z ERROR   [ 30%]\n"
        "tests/b/test_b.py::test_x SKIPPED (no kernel)   [ 40%]\n"
        "tests/b/test_b.py::test_y PASSED   [ 50%]\n"
        "FAILED tests/a/test_a.py::test_y[a b-1] - assert 0\n"
        "tests/b/test_b.py::test_slow "
    )
    bad = ["tests/a/test_a.py::test_y[a b-1]", "tests/a/test_a.py::test_z"]
    assert count(printed) == {"passed": 2, "failed": 1, "skipped": 1, "failures": bad}
    assert count("no tests ran") is None
