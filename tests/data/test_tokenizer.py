"""One vocabulary for teacher and student, every end token, and tokens nobody trained."""

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


def test_equal_vocabularies_pass_and_the_first_difference_is_named():
    tokenizer = small_tokenizer()
    check_same_tokenizer(tokenizer, small_tokenizer())
    other = small_tokenizer(330)
    with pytest.raises(ValueError, match="different tokenizers: id 320 is .* for the teacher") as e:
        check_same_tokenizer(other, tokenizer)
    assert "'absent' for the student (320 tokens)" in str(e.value)


def test_one_vocabulary_with_other_merges_is_refused():
    other = small_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="one vocabulary, but cut"):
        check_same_tokenizer(other, small_tokenizer())


def test_end_tokens_are_eos_and_what_the_template_puts_behind_an_answer():
    tokenizer = small_tokenizer()
    assert end_tokens(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokenizer.eos_token = "<|endoftext|>"
    assert end_tokens(tokenizer) == [0, 2]
    model = small_model(tokenizer)
    model.generation_config.eos_token_id = 7  # what a base model brings along stays
    assert generation_config(model, tokenizer).eos_token_id == [0, 2, 7]


def test_template_tokens_are_the_special_ones_alone():
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<unused>")]})
    assert template_tokens(tokenizer) == [1, 2]


def test_tokens_that_no_text_trained_are_found():
    torch.manual_seed(0)
    embedding = torch.randn(50, 32)
    assert untrained_tokens(embedding, [1, 2, 3]) == []
    embedding[1] = 0.01 * embedding[1]  # tiny, as Llama 3's reserved tokens
    embedding[3] = embedding[2] + 0.01  # twins: pushed the same way, never told apart
    assert untrained_tokens(embedding, [1, 2, 3]) == [1, 2, 3]
    assert untrained_tokens(embedding, [1, 2, 4]) == [1]


def test_template_arguments_are_saved_with_the_tokenizer(tmp_path):
    """So training, generation and whoever loads the student render alike without being told."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template += "{% if polite is defined and polite %}Please.{% endif %}"
    say = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="polit: the chat template of .* does not read it"):
        set_template_arguments(tokenizer, {"polit": True})
    set_template_arguments(tokenizer, {"polite": True})
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for one in (tokenizer, loaded):
        assert one.apply_chat_template(say, tokenize=False).endswith("Please.")
        assert not one.apply_chat_template(say, tokenize=False, polite=False).endswith("Please.")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        set_template_arguments(tokenizer, {"polite": True})
