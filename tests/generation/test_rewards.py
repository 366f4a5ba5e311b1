"""A reward model's scores, and the paddings that would falsify them."""

import copy

import pytest
from small import save_reward_model
from transformers import Qwen2ForSequenceClassification

from kd.data.template import render
from kd.generation.rewards import RewardModel


def conversations(prompts) -> list[list[dict]]:
    return [[*p, {"role": "assistant", "content": "a list " * i}] for i, p in enumerate(prompts, 1)]


@pytest.mark.parametrize("pad", ["<|im_start|>", "<|endoftext|>"])
def test_a_score_is_read_at_the_last_token_alone_or_in_a_batch(tokenizer, prompts, tmp_path, pad):
    """Also where pad is eos, and the text ends in it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = pad
    tokenizer.chat_template += "<|endoftext|>"
    name = str(save_reward_model(tmp_path, tokenizer))
    model = RewardModel(name, "float32", "cpu")
    asked = conversations(prompts[:6])
    wanted = []
    plain = Qwen2ForSequenceClassification.from_pretrained(name)
    for conversation in asked:
        ids = model.tokenizer(render(conversation, model.tokenizer), return_tensors="pt")
        hidden = plain.model(input_ids=ids["input_ids"]).last_hidden_state[0, -1]
        wanted.append((plain.score.weight @ hidden).item())
    assert len(set(wanted)) == 6
    assert model.score(asked) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_classifier_with_several_outputs_is_no_reward_model(tokenizer, tmp_path):
    name = str(save_reward_model(tmp_path, tokenizer, labels=3))
    with pytest.raises(ValueError, match="3 outputs; wanted a model with one"):
        RewardModel(name, "float32", "cpu")
