"""A run goes on with other processes, and ends with the weights of one that never stopped."""

import json
from pathlib import Path

import pytest
import torch
from one_run import flags
from processes import succeed
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
KEYS = {"max_steps": 8, "save_steps": 4, "lr_scheduler_type": "constant"}
KINDS = {
    "full": {},
    "lora": {"lora_rank": 4, "quantization": "nf4"},
}


def train(processes: int, models: Path, output: Path, **changes) -> str:
    command = flags(models, output, **KEYS | changes)
    return succeed(*("launch/cpu.sh", "train/distill.py", *command), NUM_PROCESSES=str(processes))


@pytest.mark.parametrize(("before", "after", "kind"), [(2, 1, "full"), (1, 2, "lora")])
def test_half_a_run_on_other_processes_ends_with_the_same_weights(
    before, after, kind, models, tmp_path
):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(before, models, whole, **KINDS[kind])
    train(before, models, halves, **KINDS[kind] | {"max_steps": 4})
    printed = train(after, models, halves, **KINDS[kind])
    assert f"goes on with {after} process" in printed
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    wanted, found = (load_file(run / name) for run in (whole, halves))
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (whole, halves)]
    losses = [[row["loss"] for row in state["log_history"] if "loss" in row] for state in states]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 8
    assert not list(halves.glob("recut-*"))
