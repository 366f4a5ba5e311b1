"""Run benchmarks/recovery.py with four kills; benchmarks/results has a hundred."""

import json
import sys

import pytest
from processes import ROOT, succeed

COMMITTED = ROOT / "benchmarks" / "results" / "recovery_cpu.json"


@pytest.mark.slow
def test_a_run_killed_four_times_in_a_row_ends_bit_equal(tmp_path):
    file = tmp_path / "recovery.json"
    # With this seed every target and every moment occurs.
    flags = ("--kills", 4, "--json", file, "--work", tmp_path / "work", "--seed", 38)
    succeed(sys.executable, "benchmarks/recovery.py", *flags, timeout=2400)
    result = json.loads(file.read_text())
    assert result["kills"] == 4 and result["equal"] and result["failed_starts"] == 0, result
    assert set(result["targets"].values()) == {1} and min(result["moments"].values()) == 1
    assert result["left_processes_behind"] == 0 and result["tensorboard_shows_every_step_once"]


def test_the_committed_result_covers_a_hundred_kills_of_every_kind():
    result = json.loads(COMMITTED.read_text())
    assert result["kills"] >= 100 and result["equal"] and result["failed_starts"] == 0
    assert result["left_processes_behind"] == 0 and min(result["targets"].values()) > 10
    assert result["left_a_save_half_written"] > 10 and min(result["moments"].values()) > 10
