"""The rewards of a run: by its reward model, without the hidden prompt, each recorded once."""

import json

import pytest
from small import save_reward_model

from kd.data.near_duplicates import Overlap
from kd.generation.filters import with_answer
from kd.generation.prompts import Prompt
from kd.generation.rewards import RewardModel, score_missing
from kd.generation.sampling import plan_samples
from kd.settings.generation import FilterSettings, GenerationSettings


def test_rewards_score_what_the_student_sees_and_are_recorded_once(tokenizer, prompts, tmp_path):
    """The file already has rewards by another model and one by this model."""
    name = str(save_reward_model(tmp_path / "reward", tokenizer))
    out = tmp_path / "out"
    out.mkdir()
    settings = GenerationSettings(
        model="m",
        prompts='[{"path": "p.jsonl"}]',
        system_prompt=["be kind and brief"],
        dtype="float32",
        output_dir=str(out),
    )
    filters = FilterSettings(reward_model=name, keep_best=1, reward_batch_size=2)
    samples = plan_samples([Prompt(prompt) for prompt in prompts[:5]], settings)
    answers = {s.key: {"answer": "a list " * i, "stopped": True} for i, s in enumerate(samples, 1)}
    asked = [with_answer(s, answers[s.key]["answer"]) for s in samples]
    expected = dict(zip(answers, RewardModel(name, "float32", "cpu").score(asked), strict=True))
    first = samples[2].key  # its batch is scored again, for the other sample
    rows = [{"key": s.key, "model": "another", "reward": 99.0} for s in samples]
    rows.append({"key": first, "model": name, "reward": expected[first]})
    file = out / "rewards.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        found = score_missing(settings, filters, samples, answers, Overlap([]))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert sorted(r["key"] for r in lines if r["model"] == name) == sorted(expected)
