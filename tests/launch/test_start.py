"""launch/start.py: how a start of several processes ends, and which signals reach the ranks."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest
from processes import ROOT, start

RANKS = ("launch/start.py", "torchrun", "--nproc-per-node", 2)
# A rank that saves after the first Ctrl-C and then hangs.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"saving\\n"))
os.write(1, b"ready\\n")
while True:
    time.sleep(1)
"""


def test_a_mistake_under_a_launch_file_is_told_once_and_exits_with_code_2(tmp_path):
    """Rank 1 may find it before rank 0 has said what it reads; then that line is missing."""
    done = start("launch/cpu.sh", "train/sft.py", "--config", tmp_path / "none.yaml")
    assert done.returncode == 2, done.stdout
    begin, *lines = done.stdout.splitlines()
    assert begin == "launch/cpu.sh: starting 2 processes of train/sft.py"
    reading = f"train/sft.py: reading {tmp_path}/none.yaml, 2 processes"
    mistakes = [line for line in lines if line != reading]
    assert mistakes[0].startswith("error: ") and len(mistakes) == len(set(mistakes)), mistakes
    assert f"no file {tmp_path}/none.yaml" in done.stdout and "FAILED" not in done.stdout


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [("os._exit(3)", 3, "exitcode  : 3"), ("os.kill(os.getpid(), 9)", 137, "SIGKILL")],
    ids=["exit code", "signal"],
)
def test_a_crash_keeps_its_code_and_its_report(tmp_path, end, code, told):
    script = tmp_path / "crash.py"
    script.write_text(f"import os, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep(60)")
    done = start("python", *RANKS, script)
    assert done.returncode == code and told in done.stdout, done.stdout
    assert "ChildFailedError" not in done.stdout


def test_the_second_ctrl_c_ends_a_hanging_run_at_once(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    job = subprocess.Popen(
        [sys.executable, *map(str, RANKS), str(script)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    ranks = []
    try:
        lines = [job.stdout.readline() for _ in range(2)]
        ranks = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGINT)
        lines += [job.stdout.readline() for _ in range(3)]
        assert lines.count("saving\n") == 2, lines
        job.send_signal(signal.SIGINT)
        assert "SIGINT again: ended at once" in job.communicate(timeout=60)[0]
        assert job.returncode == 130 and not psutil.wait_procs(ranks, timeout=60)[1]
    finally:
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.kill()
