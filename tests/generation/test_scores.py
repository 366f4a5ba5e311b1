"""The rewards of a run: of its own model, without the hidden prompt, each written once."""

import json

import pytest
from small import save_reward_model

from kd.data.near_duplicates import Overlap
from kd.generation.filters import with_answer
from kd.generation.rewards import RewardModel
from kd.generation.run_generation import score_missing
from kd.generation.sampling import Question, wanted_samples
from kd.settings.generation import FilterSettings, GenerationSettings


def test_rewards_are_this_models_of_what_the_student_will_see_and_are_asked_once(
    tokenizer, prompts, tmp_path
):
    """Beside rewards of another model in the same file, and some of this one's."""
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
    samples = wanted_samples([Question(prompt) for prompt in prompts[:5]], settings)
    answers = {s.key: {"answer": "a list " * i, "stopped": True} for i, s in enumerate(samples, 1)}
    asked = [with_answer(s, answers[s.key]["answer"]) for s in samples]
    wanted = dict(zip(answers, RewardModel(name, "float32", "cpu").score(asked), strict=True))
    first = samples[2].key  # its batch is scored again, for the other one
    rows = [{"key": s.key, "model": "another", "reward": 99.0} for s in samples]
    rows.append({"key": first, "model": name, "reward": wanted[first]})
    file = out / "rewards.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        found = score_missing(settings, filters, samples, answers, Overlap([]))
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert sorted(r["key"] for r in lines if r["model"] == name) == sorted(wanted)
