"""Experiment C at small scale: inherit layers, then train on text, distil, add hidden states."""

import json
import math
import shutil

import pytest
from processes import ROOT, start, succeed
from small_tokenizers import check_cuts_as_its_file

pytestmark = pytest.mark.slow
DATA = ROOT / "runs" / "quickstart" / "data"
SMALL = ROOT / "runs" / "small"


def finish(*command) -> str:
    """The output of a training run that writes its done marker; gloo may abort it afterwards."""
    job = start(*command, "--max_steps", "4", "--logging_steps", "1")
    folder = SMALL / command[-1].split("/")[-1].removesuffix(".yaml")
    assert (folder / "done.json").is_file(), job.stdout[-6000:]
    return job.stdout


@pytest.fixture(scope="module")
def inherited(docstrings):
    for path in SMALL.glob("c_*"):
        if path.is_dir():  # the report is a file and stays
            shutil.rmtree(path)
    return succeed("python", "train/inherit.py", "--config", "recipes/small/c_inherit.yaml")


def test_a_student_with_half_of_the_layers_trains_on_text(inherited):
    assert "layers [0, 2, 5] of 6" in inherited
    finish("python", "train/sft.py", "--config", "recipes/small/c_text.yaml")
    state = json.loads((SMALL / "c_text" / "trainer_state.json").read_text())
    assert state["log_history"][0]["cross_entropy"] > 0.0
    config = json.loads((SMALL / "c_text" / "config.json").read_text())
    assert config["inherited"]["layers"] == [0, 2, 5]  # the trained model keeps the record
    for name in ("c_inherit", "c_text"):
        check_cuts_as_its_file(SMALL / name)


def test_three_loss_terms_with_the_inherited_layer_map_and_a_sharded_teacher(inherited):
    recipe = "recipes/small/c_distill_hidden.yaml"
    printed = finish("launch/cpu.sh", "train/distill.py", "--config", recipe)
    assert "layers=((1, 1), (2, 3), (3, 6))" in printed and "teacher (1/2 per process)" in printed
    state = json.loads((SMALL / "c_distill_hidden" / "trainer_state.json").read_text())
    for step in state["log_history"][:4]:
        # DistilBERT's weights 5 : 2 : 1, the first multiplied by the squared temperature.
        terms = 0.714 * step["divergence"], 0.286 * step["cross_entropy"], 0.143 * step["hidden"]
        assert math.isclose(step["loss"], sum(terms), rel_tol=1e-2) and min(terms) > 0.0


def test_distillation_alone_and_layers_chosen_by_influence(inherited):
    printed = finish("python", "train/distill.py", "--config", "recipes/small/c_distill.yaml")
    assert "hidden states:" not in printed and ", agreement " in printed
    recipe = "recipes/small/c_inherit_measured.yaml"
    printed = succeed("python", "train/inherit.py", "--config", recipe)
    done = json.loads((SMALL / "c_inherit_measured" / "done.json").read_text())
    assert f"layers {done['layers']} of 6" in printed and len(done["perplexity_without"]) == 3
