"""The committed plans of published experiments are those that train/plan.py makes now."""

import json
import sys

import pytest
from processes import ROOT, succeed
from published import SHAPES, save_config

PLANS = json.loads((ROOT / "benchmarks/results/plan_recipes.json").read_text())["plans"]


@pytest.mark.slow
def test_plans_are_made_again(tmp_path):
    models = [f"{name}={save_config(tmp_path / name, name)}" for name in SHAPES]
    file = tmp_path / "plans.json"
    names = ["d_2xa100_80gb", "d_2x8xh100", "e_2xa100"]
    flags = ["--models", *models, "--plans", *names, "--json", file]
    succeed(sys.executable, "benchmarks/plan_recipes.py", *flags)
    assert json.loads(file.read_text())["plans"] == {name: PLANS[name] for name in names}


def test_experiment_e_fits_two_a100_with_a_margin():
    plan = PLANS["e_2xa100"]
    assert plan["processes"] == 2 and plan["total"] < 0.92 * plan["of"]
    assert any("adamw_bnb_8bit (1/2 per process)" in part for part in plan["bytes"])
