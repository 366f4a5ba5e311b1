"""launch/setup.sh names what a machine lacks, with the remedy, before it installs anything."""

import os
import subprocess
import sys

import pytest
from processes import ROOT


def setup_with(tmp_path, tools: dict[str, str]) -> subprocess.CompletedProcess:
    """Source launch/setup.sh with a PATH that has only these tools."""
    for name in ("cat", "cksum", "dirname", "grep"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return subprocess.run(
        ["/bin/bash", "-c", "set -euo pipefail; source launch/setup.sh"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "tools, message",
    [
        (
            {"python3": "[ $1 = --version ] && echo Python 3.9.2; exit 1"},
            "found Python 3.9.2; wanted",
        ),
        ({"python3": "exit 0"}, "no C++ compiler"),
    ],
)
def test_setup_names_what_is_missing_and_the_remedy(tmp_path, tools, message):
    done = setup_with(tmp_path, tools)
    assert done.returncode == 1 and message in done.stderr and "apt-get install" in done.stderr


PYTHON = f"""case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip "*) echo "$*" >> pip ;;
    "-m kd.gpu check") exit 0 ;;
    *) exec {sys.executable} "$@" ;;
esac"""


def test_setup_installs_the_build_of_torch_for_the_driver(tmp_path):
    """A new driver gives a new build; without a GPU the package index is used as it is."""
    for name in ("requirements.txt", "pyproject.toml", "kd", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python3": PYTHON, "c++": "exit 0"}.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    torch = next(line for line in ROOT.joinpath("requirements.txt").open() if "torch>" in line)
    commands = []
    for driver in (None, "535.183.01", "580.95.05"):
        if driver:
            (tools / "nvidia-smi").write_text(f"#!/bin/bash\necho 'Tesla T4, {driver}, 7.5'\n")
            (tools / "nvidia-smi").chmod(0o755)
        call = ["/bin/bash", "-c", f"cd {tmp_path}; bash launch/setup.sh"]
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        commands.append((tmp_path / "pip").read_text().splitlines())
        (tmp_path / "pip").unlink()
    assert [len(each) for each in commands] == [1, 3, 3]
    assert commands[0][0].endswith("-r requirements.txt -e .[test]")
    for each, build in zip(commands[1:], ("cu126", "cu130"), strict=True):
        assert "uninstall" in each[0] and each[0].endswith(" torch")
        wanted = f"--index-url https://download.pytorch.org/whl/{build} {torch.strip()}"
        assert each[1].endswith(wanted)
        assert each[2] == commands[0][0].replace("[test]", "[test,fast]")
