"""Rollouts equal what Transformers generates for one row alone, with its own random stream."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager

from kd.generation.engines import sampling_processors
from kd.models.heads import return_loss
from kd.settings.distillation import OnPolicySettings
from kd.training.rollouts import PaddedIdsMask, Prompt, RolloutGenerator


def student_with_likely_padding(models, tokenizer):
    """A student that gives the padded ids of its head more probability than any token."""
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    with torch.no_grad():
        student.model.embed_tokens.weight[len(tokenizer) :] *= 50
    return_loss(student)
    return student


def test_a_student_in_training_generates_what_it_does_as_loaded(models, tokenizer):
    """Greedy and sampled; the student stays in training mode with its loss, as it was."""
    plain = AutoModelForCausalLM.from_pretrained(models / "student").eval()
    student = AutoModelForCausalLM.from_pretrained(models / "student", attention_dropout=0.5)
    return_loss(student)
    student.train()
    student.model.norm.eval()
    forwards, config = (student.forward, student.lm_head.forward), student.generation_config
    modes, hooks = [m.training for m in student.modules()], []
    student.lm_head.register_forward_hook(lambda *_: hooks.append(1))
    texts = ["What does", "Return a list of all the things that there are", "A"]
    for temperature in (0.0, 0.7):
        settings = OnPolicySettings(0.5, 12, temperature, top_p=0.9, top_k=20)
        generator = RolloutGenerator(student, settings, tokenizer)
        prompts = [Prompt(tokenizer.encode(x), 12 - i, 7 + i) for i, x in enumerate(texts)]
        global_state = torch.get_rng_state()
        written = generator.generate(prompts, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), global_state)
        for prompt, ids in zip(prompts, written, strict=True):
            processors = [PaddedIdsMask(len(tokenizer))]
            processors += sampling_processors(temperature, 0.9, [prompt.seed], 20)
            alone = plain.generate(
                torch.tensor([prompt.ids]),
                max_new_tokens=prompt.limit,
                do_sample=False,
                logits_processor=processors,
            )
            assert ids == alone[0, len(prompt.ids) :].tolist() and len(ids) <= prompt.limit
    assert forwards == (student.forward, student.lm_head.forward) and not hooks
    assert [m.training for m in student.modules()] == modes and student.generation_config is config


def test_continuous_batching_generates_what_generate_does(models, tokenizer, monkeypatch):
    """Equal greedy tokens; samples depend on the seed and leave the global random stream alone."""
    student = student_with_likely_padding(models, tokenizer)
    texts = ["What does", "Return a list of all the things that there are", "A", "What is"]
    prompts = [Prompt(tokenizer.encode(x), 14 - i, 7 + i) for i, x in enumerate(texts)]

    def written(engine: str, prompts: list[Prompt], **settings) -> list[list[int]]:
        chosen = OnPolicySettings(0.5, generation_engine=engine, **settings)
        return RolloutGenerator(student, chosen, tokenizer).generate(prompts, torch.device("cpu"))

    greedy = [written(x, prompts, generation_temperature=0) for x in ("generate", "continuous")]
    assert greedy[0] == greedy[1]
    before = torch.get_rng_state()
    drawn = [written("continuous", prompts, top_k=50, top_p=0.9) for _ in range(2)]
    assert drawn[0] == drawn[1] != greedy[0] and torch.equal(torch.get_rng_state(), before)
    other = [dataclasses.replace(prompt, seed=prompt.seed + 1) for prompt in prompts]
    assert written("continuous", other, top_k=50, top_p=0.9) != drawn[0]
    assert all(token < len(tokenizer) for answer in drawn[0] for token in answer)
    # All prompts are queued when the thread starts; a late one would be sampled differently.
    waiting = []
    ended = lambda manager: waiting.append(manager.input_queue.qsize())  # noqa: E731
    monkeypatch.setattr(ContinuousBatchingManager, "start", ended)
    with pytest.raises(RuntimeError, match="answered 0 of 4 prompts"):
        written("continuous", prompts)
    assert waiting == [4]


def test_samples_of_continuous_batching_follow_the_students_distribution(models, tokenizer):
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    ids, many = tokenizer.encode("What does"), 4000
    with torch.no_grad():
        logits = student(torch.tensor([ids])).logits[0, -1, : len(tokenizer)]
    return_loss(student)
    settings = OnPolicySettings(0.5, 1, 0.5, generation_engine="continuous")
    prompts = [Prompt(ids, 1, seed) for seed in range(many)]
    answers = RolloutGenerator(student, settings, tokenizer).generate(prompts, torch.device("cpu"))
    likely = (logits / 0.5).softmax(-1).topk(8)
    for token, p in zip(likely.indices.tolist(), likely.values.tolist(), strict=True):
        count = sum(answer == [token] for answer in answers)
        assert abs(count - many * p) < 5 * math.sqrt(many * p * (1 - p))


def test_no_padded_id_is_sampled_and_a_small_workspace_splits_the_batch(models, tokenizer):
    student = student_with_likely_padding(models, tokenizer)
    prompts = [Prompt(tokenizer.encode("a" * n), 30, n) for n in range(1, 9)]
    found = []
    for workspace in (1, 2048):
        settings = OnPolicySettings(0.5, generation_workspace_mb=workspace)
        generator = RolloutGenerator(student, settings, tokenizer)
        sizes = [len(places) for places in generator.batches(prompts, list(range(8)))]
        assert sizes == [8]
        generator.model.config.num_hidden_layers = 2000 if workspace == 1 else 2
        sizes = [len(places) for places in generator.batches(prompts, list(range(8)))]
        generator.model.config.num_hidden_layers = 2
        assert (sizes == [8]) == (workspace == 2048) and sum(sizes) == 8
        found.append(generator.generate(prompts, torch.device("cpu")))
    assert found[0] == found[1]
    assert all(token < len(tokenizer) for answer in found[0] for token in answer)


@pytest.mark.gpu
def test_a_student_on_a_gpu_generates_what_it_does_as_loaded(models, tokenizer):
    """Sampled from one random stream per row; float32, so that rounding does not decide."""
    device = torch.device("cuda")
    plain, student = (
        AutoModelForCausalLM.from_pretrained(models / "student").to(device).eval() for _ in range(2)
    )
    return_loss(student)
    generator = RolloutGenerator(student, OnPolicySettings(0.5), tokenizer)
    prompts = [Prompt(tokenizer.encode("Return " * n), 20, n) for n in (1, 5, 9)]
    for prompt, ids in zip(prompts, generator.generate(prompts, device), strict=True):
        processors = [PaddedIdsMask(len(tokenizer)), *sampling_processors(1.0, 1.0, [prompt.seed])]
        alone = plain.generate(
            torch.tensor([prompt.ids], device=device),
            max_new_tokens=20,
            do_sample=False,
            logits_processor=processors,
        )
        assert ids == alone[0, len(prompt.ids) :].tolist()


@pytest.mark.gpu
def test_continuous_batching_on_a_gpu_generates_what_generate_does(models, tokenizer):
    device = torch.device("cuda")
    student = AutoModelForCausalLM.from_pretrained(models / "student").to(device)
    return_loss(student)
    prompts = [Prompt(tokenizer.encode("Return " * n), 20, n) for n in (1, 5, 9)]
    found = []
    for engine in ("generate", "continuous"):
        chosen = OnPolicySettings(0.5, generation_engine=engine, generation_temperature=0)
        found.append(RolloutGenerator(student, chosen, tokenizer).generate(prompts, device))
    assert found[0] == found[1]
