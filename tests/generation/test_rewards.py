"""The scores of a reward model, with and without padding."""

import copy

import pytest
from small import save_reward_model
from transformers import Qwen2ForSequenceClassification

from kd.data.template import render
from kd.generation.rewards import RewardModel


def conversations(prompts) -> list[list[dict]]:
    return [[*p, {"role": "assistant", "content": "a list " * i}] for i, p in enumerate(prompts, 1)]


@pytest.mark.parametrize("pad", ["<|im_start|>", "<|endoftext|>"])
def test_a_score_is_read_at_the_last_token_in_any_batch(tokenizer, prompts, tmp_path, pad):
    """This holds even if pad equals eos and the text ends with it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    tokenizer.chat_template += "<|endoftext|>"
    name = str(save_reward_model(tmp_path, tokenizer))
    model = RewardModel(name, "float32", "cpu")
    asked = conversations(prompts[:6])
    expected = []
    plain = Qwen2ForSequenceClassification.from_pretrained(name)
    for conversation in asked:
        ids = model.tokenizer(render(conversation, model.tokenizer), return_tensors="pt")
        hidden = plain.model(input_ids=ids["input_ids"]).last_hidden_state[0, -1]
        expected.append((plain.score.weight @ hidden).item())
    assert len(set(expected)) == 6
    assert model.score(asked) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_classifier_with_several_outputs_is_an_error(tokenizer, tmp_path):
    name = str(save_reward_model(tmp_path, tokenizer, labels=3))
    with pytest.raises(ValueError, match="3 outputs; wanted a model with one"):
        RewardModel(name, "float32", "cpu")
