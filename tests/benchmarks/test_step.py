"""The benchmark of whole steps by its command line, on tiny models; TRL's part where it is installed."""

import importlib.util
import json
import sys

import pytest
from processes import ROOT, start, succeed

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, dict]:
    file = tmp_path_factory.mktemp("step") / "rows.json"
    flags = "--cases tiny_distil tiny_sft --steps 3 --turns 1"
    succeed(sys.executable, "benchmarks/step.py", *flags.split(), "--json", file)
    return {row["name"]: row for row in json.loads(file.read_text())}


@pytest.mark.parametrize("name", ["tiny_distil", "tiny_sft"])
def test_the_losses_of_the_first_steps_are_those_of_whole_logits(rows, name):
    """Two micro-batches a step, updates between: a wrong gradient shows from the second loss on."""
    ours, naive = rows[name]["ours_losses"], rows[name]["naive_losses"]
    assert len(ours) == 3 and ours == pytest.approx(naive, rel=1e-5)
    assert len(set(ours)) == 3


@pytest.mark.parametrize("name", ["tiny_distil", "tiny_sft"])
def test_a_row_has_speed_memory_and_where_the_time_goes(rows, name):
    row = rows[name]
    for key in ("ours_tokens_s", "naive_tokens_s", "ours_mib", "ours_over_naive"):
        assert row[key] > 0, key
    assert 0 < row["target_tokens_a_step"] < row["positions_a_step"]
    assert 0 < row["matrix_peak_share"] < 1.2
    spent = row["break_down_s"]
    assert set(PHASES) <= set(spent)
    assert sum(spent.values()) == pytest.approx(row["ours_step_s"], rel=0.05)
    assert row["operators_s"]["matrix products"] > 0
    taken = spent["teacher"] > 0.01 * row["ours_step_s"]
    assert taken == (row["teacher"] is not None)


@pytest.mark.parametrize("name", ["tiny_distil", "tiny_sft"])
def test_what_is_not_installed_is_not_run_and_never_zero(rows, name):
    row = rows[name]
    installed = importlib.util.find_spec("trl") is not None
    for key in ("trl_tokens_s", "trl_mib", "ours_over_trl", "trl_losses"):
        assert (row[key] is not None) == installed, key
    assert installed or row["not_run"] == {"trl": "TRL is not installed"}


def test_a_case_of_another_device_is_named_with_those_there_are():
    done = start(sys.executable, "benchmarks/step.py", "--cases", "nosuch")
    assert done.returncode and "cases: nosuch; wanted some of" in done.stdout


def test_the_committed_figures_hold_what_was_asked_for():
    """Distillation 1.5 x as fast as TRL's, in no more memory; fine-tuning not slower."""
    rows = json.loads((ROOT / "benchmarks/results/step_cpu.json").read_text())
    rows = {row["name"]: row for row in rows}
    for name in ("distil_lora", "distil_full", "sft_lora", "sft_full"):
        row = rows[name]
        assert row["vocabulary"] == 152_064 and row["trl_mib_over_ours"] >= 1.0
        assert row["ours_over_trl"] >= (1.5 if row["teacher"] else 1.0)
        assert row["ours_losses"] == pytest.approx(row["trl_losses"], rel=1e-5)
