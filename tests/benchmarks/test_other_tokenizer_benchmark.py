"""Run benchmarks/other_tokenizer.py by its command line; TRL's part where it is installed."""

import json

import pytest
from processes import succeed


@pytest.mark.slow
def test_every_method_reports_bits_per_byte(docstrings, tmp_path):
    call = ["python", "benchmarks/other_tokenizer.py", "--steps", "2", "--rows", "2"]
    call += ["--heldout", "3", "--out_dir", tmp_path, "--json", tmp_path / "all.json"]
    call += ["--ways", "text alone", "text and teacher"]
    succeed(*call)
    found = json.loads((tmp_path / "all.json").read_text())["students"]
    assert [way["soft_weight"] for way in found] == [0.0, 0.5] * 2
    assert all(1.0 < way[part] < 10.0 for way in found for part in ("text", "chat"))
    told = [way["alignment"] for way in found]
    assert "equal one teacher token" in told[1]
    # The last two share the teacher's tokenizer.
    assert told[0] is told[2] is told[3] is None
