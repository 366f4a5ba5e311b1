"""DeepSpeed sums gradients over micro-batches and ranks in float32, although it trains bfloat16."""

import json

from processes import succeed


def test_gradients_of_half_precision_are_summed_in_float32(tmp_path):
    succeed("torchrun", "--nproc-per-node", 2, "tests/jobs/accumulation.py", tmp_path)
    errors = json.loads((tmp_path / "errors.json").read_text())
    for name in ("student_zero2", "student_zero3"):
        assert errors[f"{name} shipped"] < 1e-6
        assert errors[f"{name} default"] > 1e-3  # so the test can see it
