"""Run benchmarks/inheritance.py by its command line, interrupt it and continue it."""

import json

import pytest
from processes import start, succeed


@pytest.mark.slow
def test_an_interrupted_comparison_continues(docstrings, tmp_path):
    call = ["python", "benchmarks/inheritance.py", "--choices", "even", "first", "--rows", "24"]
    call += ["--seeds", "1", "--heldout", "4", "--out_dir", tmp_path]
    call += ["--json", tmp_path / "all.json"]
    stopped = start(*call, "--minutes", "0.2")
    assert stopped.returncode == 0, stopped.stdout[-3000:]
    before = {file: file.read_bytes() for file in tmp_path.glob("*/cell.json")}
    succeed(*call)
    assert all(file.read_bytes() == content for file, content in before.items())
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["choices"]["first"]["layers"] == [0, 1, 2] and len(found["runs"]) == 7
    assert all(means["seeds"] == [1] for means in found["means"].values())
    assert min(found["means"]["even, text, equal time"]["steps"]) >= 1
