"""Tiny models of random weights, their tokenizer, and files of held-out rows, made once."""

from pathlib import Path

import pytest
import torch
from held_out import CHATS, TEXTS, new_model, write_jsonl
from peft import LoraConfig, get_peft_model
from small import small_tokenizer
from transformers import AutoModelForCausalLM


def save_adapter(base: Path, folder: Path, tokens: list[int] | None) -> None:
    """LoRA layers of random weights, and with `tokens` other embeddings of these ids."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", trainable_token_indices=tokens
    )
    adapter = get_peft_model(model, config)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_pretrained(folder)


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> Path:
    """A folder of models and of JSONL files; `other` has another tokenizer."""
    root = tmp_path_factory.mktemp("house")
    tokenizer = small_tokenizer(texts=TEXTS)
    words = len(tokenizer)
    # The teacher's embeddings are padded, as large models' are.
    for name, size, hidden in (("teacher", words + 24, 48), ("student", words, 32)):
        new_model(size, hidden, seed=hidden).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name, tokens in (("adapter", None), ("adapter_tokens", [1, 2])):
        save_adapter(root / "student", root / name, tokens)
        tokenizer.save_pretrained(root / name)
    new_model(words, 32, seed=2).save_pretrained(root / "other")
    small_tokenizer(texts=["quite another text zzz qqq" * 9]).save_pretrained(root / "other")

    write_jsonl(root / "text.jsonl", [{"text": text} for text in TEXTS])
    chats = [[{"role": r, "content": c} for r, c in chat] for chat in CHATS]
    write_jsonl(root / "chat.jsonl", [{"messages": chat} for chat in chats])
    return root
