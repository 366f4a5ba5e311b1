"""An output folder has one run at a time, and a killed run leaves no lock behind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT

from kd.run import folder_lock
from kd.run.folder_lock import LOCK, lock_folder, release_locks

HOLDER = """
import os, sys, time
from kd.run.folder_lock import lock_folder
lock_folder("output_dir", sys.argv[1])
if not os.fork():  # as a worker that outlives the killed run
    print("forked", os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def released():
    yield
    release_locks()


def test_the_second_run_is_told_who_has_the_folder_and_a_kill_gives_it_back(tmp_path):
    folder = tmp_path / "run"
    secret = {"HF_TOKEN": "a-secret-of-the-environment"}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, "--password", *secret.values()],
        cwd=ROOT,
        env=os.environ | secret,
        text=True,
        stdout=subprocess.PIPE,
    )
    child = int(holder.stdout.readline().split()[1])
    try:
        with pytest.raises(ValueError, match=f"belongs to another run: process {holder.pid} on"):
            lock_folder("output_dir", str(folder))
        assert "a-secret" not in (folder / LOCK).read_text()
        holder.kill()
        holder.wait()
        lock_folder("output_dir", str(folder))  # although the forked child is still alive
        os.kill(child, 0)
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
    lock_folder("output_dir", str(folder / ".." / "run"))  # this process has it already
    release_locks()
    assert not folder.exists()  # nothing was written


def test_a_lock_file_that_its_owner_removes_is_made_again(tmp_path, monkeypatch):
    """Between our open and our flock the owner may end and remove the file."""
    flock, calls = fcntl.flock, []

    def late(file, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(folder_lock.fcntl, "flock", late)
    lock_folder("output_dir", str(tmp_path))
    other = os.open(tmp_path / LOCK, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    assert len(calls) == 2


def test_a_file_system_without_locks_is_told_and_accepted(tmp_path, monkeypatch, capsys):
    def unsupported(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    lock_folder("output_dir", str(tmp_path))
    assert "has no locks (No locks available)" in capsys.readouterr().out
