"""The one way in which tests start processes: the real command lines, from the root."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]


def start(*command, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command from the repository's root to its end; stdout and stderr as one text.

    `timeout` is for what hangs; the command ends then with all that it has started.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        said = (error.output or b"").decode(errors="replace")[-6000:]
        raise AssertionError(f"no end after {timeout} s of {process.args}: {said}") from None
    finally:
        if process.poll() is None:  # its children would hold the pipe for ever
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def succeed(*command, **options) -> str:
    """The output of a command that must end well."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
