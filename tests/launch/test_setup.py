"""launch/setup.sh names what a machine lacks, with the remedy, before it installs anything."""

import os
import subprocess

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
