"""Two nodes with networks of their own, whose host names lead to 127.0.1.1, as Debian sets them."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

JOB = """
import torch
from kd.distributed import all_sum, start_gloo
from kd.run.exit import run

def main():
    start_gloo()
    print("the sum is", all_sum(torch.ones(1)).item(), flush=True)

run(main)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """The names of two network namespaces, connected by a cable; 10.77.0.1 is the first."""
    names = [f"kd{os.getpid()}{letter}" for letter in "ab"]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip, to make networks")
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("cannot make a network here")
    try:
        ip("netns", "add", names[1])
        cables = ("cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1])
        ip("link", "add", *cables)
        for number, name in enumerate(names, 1):
            hosts = Path("/etc/netns") / name / "hosts"  # stands for /etc/hosts in the namespace
            hosts.parent.mkdir(parents=True)
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {socket.gethostname()}\n")
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


@pytest.mark.slow
def test_gloo_finds_the_interface_to_the_other_node(nodes, tmp_path):
    job = tmp_path / "job.py"
    job.write_text(JOB)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", "29400"]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *launcher, "--node-rank", str(number), job],
            env=own,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for number, name in enumerate(nodes)
    ]
    try:
        printed = [node.communicate(timeout=300)[0] for node in started]
    finally:
        for node in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
    assert ["the sum is 2.0" in text for text in printed] == [True, True], printed
