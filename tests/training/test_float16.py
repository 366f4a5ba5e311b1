"""The profile of two T4 in float16, by its launch file on two CPU processes; loss scaling."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_run import flags
from processes import ROOT, succeed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kd.training.non_finite import NonFinite

STEPS, RATE = 8, 1e-3
ON_CPU = f"{ROOT}:{ROOT / 'tests/float16_on_cpu'}"  # lets DeepSpeed compute in float16


def train(models, output, precision: str, **changes) -> tuple[str, list[dict]]:
    """(what a run prints, its logged steps): NF4 QLoRA under ZeRO-2, a ZeRO-3 teacher."""
    keys = {
        "quantization": "nf4",
        "lora_rank": 4,
        "gradient_checkpointing": True,
        "deepspeed": "ds_configs/student_zero2.json",
        "teacher_deepspeed": "ds_configs/teacher_zero3.json",
        "teacher_dtype": precision,
        "precision": precision,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "save_steps": 4,
        "lr_scheduler_type": "linear",
    }
    command = flags(models, output, **keys | changes)
    printed = succeed("launch/2xt4.sh", "--cpu", "train/distill.py", *command, PYTHONPATH=ON_CPU)
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return printed, [entry for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """float16 with a loss scale that overflows at first, the same resumed, and float32.

    Weights that float16 holds exactly get the same NF4 codes in every run.
    """
    folder = tmp_path_factory.mktemp("float16")
    models = Path(shutil.copytree(models, folder / "models"))
    rounded = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float16)
    rounded.save_pretrained(models / "student")
    config = json.loads((ROOT / "ds_configs/student_zero2.json").read_text())
    config["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    (folder / "zero2.json").write_text(json.dumps(config))
    half = {"precision": "float16", "deepspeed": folder / "zero2.json"}
    found = {"half": train(models, folder / "half", **half)}
    shutil.copytree(folder / "half", folder / "resumed")
    (folder / "resumed/done.json").unlink()
    shutil.rmtree(folder / f"resumed/checkpoint-{STEPS}")
    found["resumed"] = train(models, folder / "resumed", **half)
    # A learning rate that changes no weight, as the skipped updates do not.
    found["exact"] = train(models, folder / "exact", "float32", learning_rate=1e-12)
    return folder, found


def skipped(steps: list[dict]) -> list[bool]:
    return [not math.isfinite(step["grad_norm"]) for step in steps]


@pytest.mark.slow
def test_float16_has_the_loss_and_gradient_norm_of_float32_to_three_digits(runs):
    """Compared up to the first update, so at equal weights; the teacher is in float16, too."""
    _, found = runs
    half, exact = found["half"][1], found["exact"][1]
    first = skipped(half).index(False)
    assert 0 < first < STEPS - 2 and "teacher (1/2 per process)" in found["half"][0]
    for ours, theirs in zip(half[: first + 1], exact, strict=False):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert half[first]["grad_norm"] == pytest.approx(exact[first]["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_an_overflow_halves_the_scale_and_stops_neither_schedule_nor_run(runs):
    """A skipped update takes no part in the schedule, as in Transformers."""
    folder, found = runs
    printed, half = found["half"]
    scales = re.findall(r"update is skipped; the loss scale is now ([\d,]+)", printed)
    scales = [int(scale.replace(",", "")) for scale in scales]
    assert scales == [2 ** (23 - i) for i in range(sum(skipped(half)))]
    applied = 0
    for step, skip in zip(half, skipped(half), strict=True):
        assert step["learning_rate"] == pytest.approx(RATE * (1 - applied / STEPS))
        applied += not skip
    weights = load_file(folder / "half/adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_loss_scale(runs):
    """With a new scale of 2^24 its first steps would be skipped again."""
    folder, found = runs
    (_, half), (printed, resumed) = found["half"], found["resumed"]
    assert f"step 5 of {STEPS}" in printed and f"step 4 of {STEPS}" not in printed
    for one, other in zip(half, resumed, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert one[key] == other[key]
    name = "adapter_model.safetensors"
    assert (folder / "half" / name).read_bytes() == (folder / "resumed" / name).read_bytes()


@pytest.mark.parametrize("floor", [0.0, 1.0])  # GradScaler has none; DeepSpeed's is 1
def test_a_gradient_that_overflows_at_every_scale_ends_the_run(tmp_path, capsys, floor):
    """Every loss is finite. A scaler that finds its scale in time does not count as a failure."""
    scale = SimpleNamespace(value=4.0)
    trainer = SimpleNamespace(
        is_deepspeed_enabled=False,
        args=SimpleNamespace(output_dir=tmp_path, fp16=True, process_index=0),
        accelerator=SimpleNamespace(
            optimizer_step_was_skipped=True, scaler=SimpleNamespace(get_scale=lambda: scale.value)
        ),
    )
    non_finite = NonFinite(trainer, limit=1)

    def step(number: int) -> None:
        non_finite.note(torch.zeros(1, 1), torch.ones(()))
        if trainer.accelerator.optimizer_step_was_skipped:
            scale.value = max(scale.value / 2, floor)
        non_finite.end_step(False, trainer.args, number)

    step(1)
    step(2)
    assert "step 2: the gradient overflows float16" in capsys.readouterr().out
    assert non_finite.in_a_row == 0  # so step 2 may be saved
    trainer.accelerator.optimizer_step_was_skipped = False
    step(3)
    trainer.accelerator.optimizer_step_was_skipped = True
    step(4)  # after a good step, so at another scale
    with pytest.raises(ValueError, match="step 5 overflows float16 even with a loss scale of 1"):
        step(5)
