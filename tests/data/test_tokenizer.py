"""Comparison of tokenizers, end tokens, template arguments and untrained tokens."""

import pytest
import torch
from small import small_model, small_tokenizer
from tokenizers import AddedToken, normalizers

from kd.data.tokenizer import (
    check_same_tokenizer,
    end_tokens,
    generation_config,
    load_tokenizer,
    set_template_arguments,
    template_tokens,
    untrained_tokens,
)


def test_equal_vocabularies_pass_and_the_first_difference_is_reported():
    tokenizer = small_tokenizer()
    check_same_tokenizer(tokenizer, small_tokenizer())
    other = small_tokenizer(330)
    with pytest.raises(ValueError, match="different tokenizers: id 320 is .* for the teacher") as e:
        check_same_tokenizer(other, tokenizer)
    assert "'absent' for the student (320 tokens)" in str(e.value)


def test_equal_vocabularies_with_different_merges_are_rejected():
    other = small_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="the same vocabulary, but tokenize"):
        check_same_tokenizer(other, small_tokenizer())


def test_end_tokens_are_eos_and_the_templates_end_of_turn():
    tokenizer = small_tokenizer()
    assert end_tokens(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.eos_token = "<|endoftext|>"
    assert end_tokens(tokenizer) == [0, 2]
    model = small_model(tokenizer)
    model.generation_config.eos_token_id = 7  # an end token of the base model is kept
    assert generation_config(model, tokenizer).eos_token_id == [0, 2, 7]


def test_template_tokens_are_only_special_ones():
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<unused>")]})
    assert template_tokens(tokenizer) == [1, 2]


def test_untrained_tokens_are_found():
    torch.manual_seed(0)
    embedding = torch.randn(50, 32)
    assert untrained_tokens(embedding, [1, 2, 3]) == []
    embedding[1] = 0.01 * embedding[1]  # tiny, as Llama 3's reserved tokens
    embedding[3] = embedding[2] + 0.01  # nearly equal: the output layer pushed both the same way
    assert untrained_tokens(embedding, [1, 2, 3]) == [1, 2, 3]
    assert untrained_tokens(embedding, [1, 2, 4]) == [1]


def test_template_arguments_are_saved_with_the_tokenizer(tmp_path):
    """So training, generation and users of the student render alike without further settings."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template += "{% if polite is defined and polite %}Please.{% endif %}"
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="polit: the chat template of .* does not read it"):
        set_template_arguments(tokenizer, {"polit": True})
    set_template_arguments(tokenizer, {"polite": True})
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for one in (tokenizer, loaded):
        assert one.apply_chat_template(messages, tokenize=False).endswith("Please.")
        assert not one.apply_chat_template(messages, tokenize=False, polite=False).endswith(
            "Please."
        )
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        set_template_arguments(tokenizer, {"polite": True})
