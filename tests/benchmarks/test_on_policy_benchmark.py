"""Run benchmarks/on_policy.py by its command line with small numbers."""

import json

import pytest
from processes import start

pytestmark = pytest.mark.usefixtures("docstrings")


@pytest.mark.slow
def test_every_method_is_trained_and_measured_on_both_texts(tmp_path):
    small = ("--first_steps", "1", "--steps", "1", "--heldout", "4", "--new_tokens", "4")
    words = (*small, "--seeds", "0", "--rows", "2", "--out_dir", tmp_path / "students")
    job = start("python", "benchmarks/on_policy.py", *words, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    ways = [row["stage"] for row in found["stage"]]
    assert ways[0] == "none" and "on-policy, reverse_kl" in ways, job.stdout[-4000:]
    for row in found["stage"]:
        assert row["reverse_kl over own text"] > 0 < row["reverse_kl over data text"]
        assert 1 <= row["tokens of an answer"] <= 4
    for row in found["beside_trl"] or []:  # empty where TRL is not installed
        assert row["relative_difference"] < 1e-5
