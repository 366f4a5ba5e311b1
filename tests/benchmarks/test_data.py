"""Run benchmarks/data.py by its command line on few rows."""

import json
import sys

from processes import succeed


def test_all_implementations_prepare_the_same_tokens(tmp_path):
    file = tmp_path / "figures.json"
    flags = "--rows 40 --max_length 256 --steps 2 --repeats 1"
    succeed(sys.executable, "benchmarks/data.py", *flags.split(), "--json", file)
    report = json.loads(file.read_text())
    ours = [row for row in report["preparation"] if row["name"].startswith("ours")]
    assert len(ours) == 2
    for row in ours:
        assert row["rows"] <= 40 and 0 < row["targets"] < row["tokens"]
        assert row["again_s"] > 0 and row["prepare_rows_per_s"] > 0
    assert 0 < report["step"]["share_lost_to_data"] < 1
