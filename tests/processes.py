"""Start processes as users do: real command lines, from the root of the repository."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def begin(*command, **environment) -> subprocess.Popen:
    """Start a command from the root of the repository; stdout and stderr are one text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start(*command, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command as `begin` starts it.

    After `timeout` seconds the command and everything that it has started are killed.
    """
    process = begin(*command, **environment)
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        output = (error.output or b"").decode(errors="replace")[-6000:]
        raise AssertionError(f"{process.args} did not end within {timeout} s: {output}") from None
    finally:
        if process.poll() is None:  # its children would keep the pipe open
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def logged_steps(printed: str) -> int:
    """The number of training steps whose line a run has printed, with logging_steps 1."""
    return len(re.findall(r"step \d+ of \d+: loss", printed))


def succeed(*command, **options) -> str:
    """The output of a command that must succeed."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
