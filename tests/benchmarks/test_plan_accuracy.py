"""Run benchmarks/plan.py by its command line on a layout with many parts.

Its student is small once it is loaded in 4 bits; memory that loading frees must not stay.
"""

import json
import sys

import pytest
from processes import succeed

LAYOUT = "QLoRA, ZeRO-2, checkpointing, teacher sharded"


@pytest.mark.slow
def test_plan_is_within_fifteen_percent_of_measured_memory(tmp_path):
    file = tmp_path / "rows.json"
    succeed(sys.executable, "benchmarks/plan.py", "--layouts", LAYOUT, "--json", file)
    (row,) = json.loads(file.read_text())
    assert row["planned_mib"] > 100 and abs(row["ratio"] - 1) < 0.15, row
