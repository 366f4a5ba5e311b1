"""Sampling per row, greedy decoding, end tokens and the prompt that the model sees."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kd.generation.engines import (
    GumbelNoise,
    LocalEngine,
    check_template,
    sampling_processors,
)
from kd.models.frozen import load_frozen


def engine(name, new: int = 24) -> LocalEngine:
    return LocalEngine(str(name), "float32", "cpu", new)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_sampled_frequencies_follow_the_softmax(temperature, top_p):
    """Pearson's chi-square of 20,000 rows, each with its own seed, is below its 0.999 quantile."""
    rows = 20_000
    logits = torch.tensor([2.0, 1.5, 0.3, 0.0, -0.5, -1.0])
    p = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1.0:  # the smallest set of most probable tokens that reaches top_p
        ordered, order = p.sort(descending=True)
        p[order[ordered.cumsum(0) - ordered >= top_p]] = 0.0
        p /= p.sum()
    process = sampling_processors(temperature, top_p, list(range(rows)))
    drawn = process(torch.zeros(rows, 1), logits.repeat(rows, 1)).argmax(-1)
    counts = torch.bincount(drawn, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    expected = rows * p[p > 0]
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom; with fewer the test is weaker


def test_successive_samples_of_a_row_are_independent():
    noise, scores = GumbelNoise([7]), torch.zeros(1, 4)
    drawn = torch.tensor([noise(scores, scores).argmax() for _ in range(8_000)])
    pairs = torch.bincount(4 * drawn[:-1] + drawn[1:], minlength=16).double()
    assert ((pairs - 500) ** 2 / 500).sum() < 37.7  # 15 degrees of freedom, 0.999


def test_a_sample_depends_on_its_seed_and_not_on_the_rest_of_the_batch():
    scores = torch.zeros(3, 50)
    together = GumbelNoise([1, 2, 3])(scores, scores)
    alone = GumbelNoise([2])(scores[:1], scores[:1])
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])


def test_temperature_zero_equals_greedy_decoding_by_transformers(teacher, tokenizer, prompts):
    ours = engine(teacher)
    answers = ours.answer(prompts[:6], [0] * 6, temperature=0.0)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    batch = ours.encode(prompts[:6])
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    out = model.generate(
        **batch, do_sample=False, max_new_tokens=24, eos_token_id=ends, pad_token_id=ends[1]
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.text for answer in answers] == texts
    assert len(set(texts)) > 1


def test_padding_and_the_rest_of_the_batch_do_not_change_an_answer(teacher, prompts):
    ours = engine(teacher)
    seeds = list(range(8))
    together = ours.answer(prompts[:8], seeds)
    alone = [ours.answer([p], [s])[0] for p, s in zip(prompts[:8], seeds, strict=True)]
    assert together == alone


def test_answers_stop_at_eos_and_at_the_end_token_of_the_template(teacher, tokenizer):
    ours = engine(teacher)
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    text = tokenizer("a list")["input_ids"]
    for stop in (eos, end):
        assert ours.read([*text, stop, eos, eos]) == ours.read([*text, stop])
        assert ours.read([*text, stop]).stopped
    cut = ours.read(text)
    assert (cut.text, cut.stopped, cut.tokens) == ("a list", False, len(text))


def test_an_adapter_folder_answers_like_the_merged_model(teacher, tokenizer, prompts, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(teacher)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    asked = prompts[:4], [0] * 4
    adapter, merged, plain = (
        engine(path).answer(*asked, temperature=0.0)
        for path in (tmp_path / "adapter", tmp_path / "merged", teacher)
    )
    assert adapter == merged != plain
    # The generation config of the adapter's folder overrides that of its base.
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [1, 2, 9]}')
    model = load_frozen(str(tmp_path / "adapter"), torch.float32, "cpu")
    assert model.generation_config.eos_token_id == [1, 2, 9]


def test_a_prompt_that_exceeds_the_models_positions_is_an_error(teacher):
    with pytest.raises(ValueError, match="256 positions"):
        engine(teacher, new=250).encode([[{"role": "user", "content": "what is a list?"}]])


def test_a_template_that_drops_the_system_prompt_is_an_error(tokenizer):
    template = tokenizer.chat_template
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + template
    )
    loop = "{% for m in messages %}"
    assert loop in template
    silent = template.replace(loop, "{% for m in messages if m['role'] != 'system' %}")
    check_template(tokenizer, "teacher", "be kind")
    for broken in (refusing, silent):
        tokenizer.chat_template = broken
        try:
            check_template(tokenizer, "teacher", None)
            with pytest.raises(ValueError, match="does not render system messages"):
                check_template(tokenizer, "teacher", "be kind")
        finally:
            tokenizer.chat_template = template


def test_the_end_token_counts_and_the_last_position_may_be_used(teacher, tokenizer):
    ours = engine(teacher)
    assert ours.read([7, 8, tokenizer.eos_token_id, 0]).tokens == 3
    question = [[{"role": "user", "content": "what is a list?"}]]
    width = ours.encode(question)["input_ids"].shape[1]
    assert engine(teacher, new=256 - width).encode(question)["input_ids"].shape[1] == width
    with pytest.raises(ValueError, match="256 positions"):
        engine(teacher, new=257 - width).encode(question)
