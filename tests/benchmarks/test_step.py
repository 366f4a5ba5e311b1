"""Run benchmarks/step.py by its command line on tiny models; TRL's part where it is installed."""

import importlib.util
import json
import sys

import pytest
from processes import ROOT, start, succeed

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    file = tmp_path_factory.mktemp("step") / "rows.json"
    for flags in (
        "--cases tiny_distil tiny_sft --steps 3 --turns 1",
        "--cases tiny_qlora --steps 3 --turns 1 --implementations ours",
    ):
        succeed(sys.executable, "benchmarks/step.py", *flags.split(), "--json", file)
    return {row["name"]: row for row in json.loads(file.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_distil", "tiny_sft"])
def test_first_losses_equal_those_of_full_logits(rows, name):
    """Steps have two micro-batches, so a wrong gradient changes the second loss."""
    ours, naive = rows[name]["ours_losses"], rows[name]["naive_losses"]
    assert len(ours) == 3 and ours == pytest.approx(naive, rel=1e-5)
    assert len(set(ours)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_distil", "tiny_sft", "tiny_qlora"])
def test_a_row_has_speed_memory_and_time_breakdown(rows, name):
    row = rows[name]
    alone = row["not_run"].get("naive") == "not requested"
    assert alone == (name == "tiny_qlora") and row["planned_mib"] is None  # for a GPU only
    for key in ("ours_tokens_s", "naive_tokens_s", "ours_mib", "ours_over_naive"):
        assert alone and "naive" in key or row[key] > 0, key
    assert 0 < row["target_tokens_a_step"] < row["positions_a_step"]
    assert 0 < row["matrix_peak_share"] < 1.2
    spent = row["break_down_s"]
    assert set(PHASES) <= set(spent)
    assert sum(spent.values()) == pytest.approx(row["ours_step_s"], rel=0.05)
    assert row["operators_s"]["matrix products"] > 0
    taken = spent["teacher"] > 0.01 * row["ours_step_s"]
    assert taken == (row["teacher"] is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_distil", "tiny_sft"])
def test_a_missing_implementation_is_not_run_and_never_zero(rows, name):
    row = rows[name]
    installed = importlib.util.find_spec("trl") is not None
    for key in ("trl_tokens_s", "trl_mib", "ours_over_trl", "trl_losses"):
        assert (row[key] is not None) == installed, key
    assert installed or row["not_run"] == {"trl": "TRL is not installed"}


def test_an_unknown_case_lists_the_available_ones():
    done = start(sys.executable, "benchmarks/step.py", "--cases", "nosuch")
    assert done.returncode and "cases: nosuch; wanted some of" in done.stdout


def test_the_committed_results_meet_the_targets():
    """Targets: distillation 1.5 x TRL's speed with no more memory; fine-tuning no slower."""
    rows = json.loads((ROOT / "benchmarks/results/step_cpu.json").read_text())
    rows = {row["name"]: row for row in rows}
    for name in ("distil_lora", "distil_full", "sft_lora", "sft_full"):
        row = rows[name]
        assert row["vocabulary"] == 152_064 and row["trl_mib_over_ours"] >= 1.0
        assert row["ours_over_trl"] >= (1.5 if row["teacher"] else 1.0)
        assert row["ours_losses"] == pytest.approx(row["trl_losses"], rel=1e-5)
