"""eval/speed.py times greedy generation, and its rates follow from the recorded times."""

import json
import statistics

import pytest
import torch
from held_out import command, inside

from kd.evaluation.models import load_model
from kd.evaluation.speed import generate


def test_the_timed_work_is_greedy_generation_without_an_end_token(house):
    model = load_model(str(house / "student"), "float32", "sdpa", "cpu")
    prompt = torch.arange(3, 27).view(2, 12)
    tokens, times = generate(model, prompt, 40)
    wanted = model.generate(
        prompt, do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(tokens, wanted[:, 12:]) and tokens.shape == (2, 40)
    assert times.prefill > 0 and times.decoding > 0


def test_rates_follow_from_the_times_and_sizes_from_the_files(house, tmp_path):
    flags = [
        *("--models", *(f"{name}={house / name}" for name in ("teacher", "adapter"))),
        *("--batch_sizes", 1, 3, "--prompt_tokens", 16, "--new_tokens", 5, "--repeats", 3),
        *("--out_dir", tmp_path),
    ]
    ran = command("speed.py", *flags)
    assert ran.returncode == 0, ran.stderr
    weights = lambda name, file: (house / name / file).stat().st_size  # noqa: E731
    base = weights("student", "model.safetensors")
    disk = {
        "teacher": weights("teacher", "model.safetensors"),
        "adapter": base + weights("adapter", "adapter_model.safetensors"),
    }
    for name in ("teacher", "adapter"):
        found = json.loads((tmp_path / "speed" / f"{name}.json").read_text())
        model = load_model(str(house / name), "float32", "sdpa", "cpu")
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
        assert found["bytes_in_memory"] == 4 * found["parameters"]
        assert found["bytes_on_disk"] == disk[name]
        for size, numbers in found["batch_sizes"].items():
            assert len(numbers["prefill_seconds"]) == len(numbers["decoding_seconds"]) == 3
            prefill, decoding = (
                statistics.median(numbers[f"{part}_seconds"]) for part in ("prefill", "decoding")
            )
            assert numbers["prefill_tokens_per_second"] == int(size) * 16 / prefill
            assert numbers["decoding_tokens_per_second"] == int(size) * 4 / decoding
            assert numbers["first_token_seconds"] == prefill
            assert numbers["peak_memory_bytes"] is None  # not 0: it is not measured on a CPU
    again = inside("speed.py", *flags)
    assert again.stdout.count("measured already") == 2


def test_prompts_beyond_the_models_positions_are_refused(house, tmp_path):
    flags = ("--models", f"student={house / 'student'}", "--prompt_tokens", 10**6)
    with pytest.raises(ValueError, match="positions of student"):
        inside("speed.py", *flags, "--out_dir", tmp_path)
