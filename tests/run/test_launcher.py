"""A process that was not started by a launcher, or not as its environment says."""

import os
import signal
import socket
import sys

import pytest
from processes import start

from kd.run.launcher import check_launcher

STALE = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
HOSTED = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # set by torchrun and accelerate launch


@pytest.fixture
def left_over(monkeypatch):
    """Set variables as an earlier launch would have left them in a shell."""

    def leave(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    return leave


def test_a_left_over_world_size_is_told(left_over):
    left_over(WORLD_SIZE="2")
    with pytest.raises(ValueError, match="without RANK, MASTER_ADDR, MASTER_PORT: no launcher set"):
        check_launcher()


def test_a_launcher_that_has_gone_is_told_and_a_living_one_is_not(left_over):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        left_over(**STALE, **HOSTED, MASTER_PORT=str(port))
        check_launcher()
    with pytest.raises(ValueError, match=f"nobody listens at 127.0.0.1:{port}; unset WORLD_SIZE"):
        check_launcher()


def test_ranks_started_by_hand_are_awaited_and_that_is_told(left_over, capsys):
    left_over(**STALE, MASTER_PORT="29500")
    check_launcher()
    assert "waiting for the others at 127.0.0.1:29500" in capsys.readouterr().out


def test_a_script_says_what_it_does_before_it_imports_torch(tmp_path):
    """The torch of this run ends the process when it is imported."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    recipe = "recipes/small/a_teacher.yaml"
    done = start("python", "train/sft.py", "--config", recipe, PYTHONPATH=str(tmp_path))
    assert done.returncode, done.stdout
    assert done.stdout.startswith(f"train/sft.py: reading {recipe}, one process\n")


INTERRUPTED = f"""
import os
import signal
from kd.run.exit import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
run(lambda: os.kill(os.getpid(), {int(signal.SIGINT)}))
"""


def test_ctrl_c_in_a_script_is_one_line():
    done = start(sys.executable, "-c", INTERRUPTED)
    assert done.returncode == 130 and "KD_LAUNCHER" not in os.environ
    assert done.stdout == (
        "stopped by SIGINT; what was saved is kept, and the same command goes on from it\n"
    )
