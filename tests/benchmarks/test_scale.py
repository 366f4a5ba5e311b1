"""Compare the formula for communication with counts: two processes, and the committed table."""

import json
import sys

import pytest
from processes import ROOT, succeed

LAYOUTS = ["LoRA, ZeRO-2, sharded teacher", "LoRA, ZeRO-3, checkpointing, sharded teacher"]
LAYOUTS += ["full, DDP", "full, ZeRO-3, checkpointing"]


def rounds_agree(row: dict) -> bool:
    """Within 15 %, or one round: DDP also broadcasts its few buffers."""
    counted = row["counted_rounds"]
    return counted > 1 and abs(row["formula_rounds"] - counted) <= max(1, 0.15 * counted)


@pytest.mark.slow
def test_the_formula_is_within_five_percent_of_bytes_counted_on_two_processes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "student: data/quickstart/student\nteacher: data/quickstart/teacher\nmax_length: 64\n"
        "global_batch_size: 16\ndata: []\n"
    )
    file = tmp_path / "scale.json"
    flags = ["--ranks", 2, "--layouts", *LAYOUTS, "--recipes", tmp_path / "recipe.yaml"]
    succeed(sys.executable, "benchmarks/scale.py", *flags, "--json", file)
    report = json.loads(file.read_text())
    assert [row["layout"] for row in report["counted"]] == LAYOUTS
    for row in report["counted"]:
        assert row["counted_bytes"] > 1e6 and abs(row["formula_over_counted"] - 1) < 0.05, row
        assert rounds_agree(row), row
    modelled = {row["layout"]: row for row in report["modelled"]}
    assert len(modelled) == 9
    for row in modelled.values():  # with more GPUs, each has fewer rows and no fewer bytes to send
        assert row["rows a GPU, 8 GPUs"] == 2 and row["rows a GPU, 1024 GPUs"] == 1
        assert row["computation s, 8 GPUs"] > row["computation s, 1024 GPUs"] > 0
    sharded = modelled["DDP, teacher sharded"]["GB sent, 64 GPUs"]
    assert sharded > modelled["DDP, teacher whole"]["GB sent, 64 GPUs"]
    latencies = {
        name: modelled[f"DDP, teacher {name}"]["NVLink + 8 InfiniBand latency s, 1024 GPUs"]
        for name in ("whole", "sharded", "sharded per node")
    }
    assert latencies["whole"] < latencies["sharded per node"] < latencies["sharded"]
    assert "| full, DDP | 2 |" in file.with_suffix(".md").read_text()


def test_the_committed_counts_are_within_five_percent_of_the_formula_on_2_and_4_ranks():
    report = json.loads((ROOT / "benchmarks/results/scale.json").read_text())
    ranks = {
        row["ranks"]: [r for r in report["counted"] if r["ranks"] == row["ranks"]]
        for row in report["counted"]
    }
    assert set(ranks) == {1, 2, 4} and len(ranks[2]) == len(ranks[4]) >= 10
    assert all(row["counted_bytes"] == row["formula_bytes"] == 0 for row in ranks[1])
    for row in ranks[2] + ranks[4]:
        assert abs(row["formula_over_counted"] - 1) < 0.05, row
        assert rounds_agree(row), row
    recipes = {row["recipe"] for row in report["modelled"]}
    assert len(recipes) >= 9 and all((ROOT / recipe).exists() for recipe in recipes)
