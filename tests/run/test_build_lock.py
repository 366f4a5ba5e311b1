"""Operators that are compiled at first use: a killed build does not block the next one."""

import os
import shutil
import signal

import pytest
from processes import start, succeed

from kd.run.build_lock import has_lock, remove_abandoned

SOURCE = 'extern "C" int one() { return 1; }'
BUILD = """
import sys
from torch.utils import cpp_extension
from kd.run.build_lock import use_build_locks
use_build_locks()
cpp_extension.load(name="one", sources=[sys.argv[1]], is_python_module=False)
print("built")
"""
KILLED = """
import os, signal
from torch.utils.file_baton import FileBaton
from kd.run.build_lock import use_build_locks
use_build_locks()
folder = os.environ["TORCH_EXTENSIONS_DIR"] + "/one"
os.makedirs(folder)
assert FileBaton(folder + "/lock").try_acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_a_build_goes_on_after_one_that_was_killed(tmp_path):
    source = tmp_path / "one.cpp"
    source.write_text(SOURCE)
    folder = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "operators")}
    assert start("python", "-c", KILLED, **folder).returncode == -signal.SIGKILL
    lock = tmp_path / "operators" / "one" / "lock"
    assert lock.is_file()
    assert "built" in succeed("python", "-c", BUILD, source, timeout=120, **folder)
    assert not lock.exists() and (lock.parent / "one.so").is_file()
    lock.touch()  # of an ordinary torch that was killed long ago
    os.utime(lock, (0, 0))
    assert "built" in succeed("python", "-c", BUILD, source, timeout=120, **folder)


def test_a_build_that_goes_on_is_waited_for(tmp_path):
    """That of an ordinary torch, which locks nothing, and that of another run."""
    lock = tmp_path / "lock"
    lock.touch()
    assert not remove_abandoned(lock) and lock.exists()
    with lock.open("wb") as other:
        assert has_lock(other.fileno())
        os.utime(lock, (0, 0))  # a locked file counts however old it is
        assert not remove_abandoned(lock) and lock.exists()
    assert remove_abandoned(lock) and not lock.exists()
