"""Run benchmarks/loss.py by its command line, and check the peak memory of the loss."""

import json
import sys

import pytest
from processes import succeed

WANTED = [
    "shape",
    "divergence",
    "ours_s",
    "trl_s",
    "naive_s",
    "limit_s",
    "ours_mib",
    "trl_mib",
    "liger_s",
]


@pytest.mark.slow
def test_loss_stays_within_its_workspace_at_a_real_vocabulary(tmp_path):
    """V = 152 064 and more tokens than a tile: the peak above the inputs stays within the limit."""
    file = tmp_path / "rows.json"
    flags = "--pairs 48->32 --tokens 200 --divergences jensen_shannon --repeats 1"
    workspace = ["--loss_workspace_mb", 192]
    succeed(sys.executable, "benchmarks/loss.py", *flags.split(), *workspace, "--json", file)
    rows = json.loads(file.read_text())
    assert [row["divergence"] for row in rows] == ["jensen_shannon"]
    for row in rows:
        assert set(WANTED) <= set(row) and row["ours_s"] > 0 and row["limit_s"] > 0
        whole = row["tokens"] * row["vocabulary"] * 4 / 2**20  # full logits of one model
        assert row["ours_mib"] <= 192 < 2 * whole < row["naive_mib"]
