"""The one way in which tests start processes: the real command lines, from the root."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*command, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command from the repository's root to its end; stdout and stderr as one text.

    `timeout` is there for what hangs alone: the command ends then with all of its group.
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
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        said = (error.output or b"").decode(errors="replace")[-6000:]
        raise AssertionError(f"no end after {timeout} s of {process.args}: {said}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def succeed(*command, **options) -> str:
    """The output of a command that must end well."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
