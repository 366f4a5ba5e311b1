"""The one way in which tests start processes: the real command lines, from the root."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*command, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command from the repository's root to its end; stdout and stderr as one text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(*command, **options) -> str:
    """The output of a command that must end well."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
