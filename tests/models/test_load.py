"""Loading a student: the note about template tokens that look untrained."""

import pytest
import torch
from small import save_small, small_tokenizer
from transformers import AutoModelForCausalLM

from kd.data.tokenizer import load_tokenizer
from kd.models.load import load_trained
from kd.settings.distillation import ModelSettings

NOTE = "<|im_start|>, <|im_end|> look untrained"


@torch.no_grad()
def similar_template_tokens(folder, expects_the_end: bool):
    """A model whose two template tokens have nearly the same embedding.

    With `expects_the_end` its head gives the end of a turn a high probability, as in chat models.
    """
    save_small(folder, small_tokenizer(), tie_word_embeddings=False)
    tokenizer, model = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows = model.get_input_embeddings().weight
    rows[end] = 1.01 * rows[start]
    if expects_the_end:
        text = "The capital of France is Paris."
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        chat += [{"role": "assistant", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("<|im_end|>")[0]
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        hidden = model.base_model(ids).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[end] = 50 * hidden / hidden.square().sum()
    model.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("trained", [True, False], ids=["chat model", "base model"])
def test_only_rank_0_of_a_base_model_is_told_of_untrained_template_tokens(
    tmp_path, capsys, monkeypatch, trained, rank
):
    tokenizer = similar_template_tokens(tmp_path, trained)
    capsys.readouterr()
    monkeypatch.setenv("RANK", str(rank))
    load_trained(str(tmp_path), ModelSettings(dtype="float32", lora_rank=2), tokenizer)
    assert (NOTE in capsys.readouterr().out) == (not trained and rank == 0)
