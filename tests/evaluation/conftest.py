"""Session fixtures: tiny models, tokenizers and held-out rows; and a report of made results."""

import json
from pathlib import Path

import pytest
import torch
from held_out import CHATS, TEXTS, inside, new_model, write_jsonl
from made_results import write
from peft import LoraConfig, get_peft_model
from small import small_tokenizer
from transformers import AutoModelForCausalLM

SAMPLE = {"prompt": "What is a|b?", "answers": {"distill": "<b>\n*bold*", "sft": "x" * 400}}


def save_adapter(base: Path, folder: Path, tokens: list[int] | None) -> None:
    """Save LoRA layers of random weights, and new embeddings of the ids `tokens`."""
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
    """A folder of models and JSONL files; the model `other` has a different tokenizer."""
    root = tmp_path_factory.mktemp("house")
    tokenizer = small_tokenizer(texts=TEXTS)
    words = len(tokenizer)
    # The teacher's embeddings are padded, like those of large models.
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


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """(folder, finished command, report.json, report.md) of one run of eval/report.py."""
    folder = tmp_path_factory.mktemp("report")
    write(folder)
    run = folder / "runs" / "distill-seed0"
    state = run / "checkpoint-20" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    log = [{"step": s, "loss": 2.0 / s, "cross_entropy": 3.0 / s} for s in (10, 20)]
    log.append({"step": 20, "eval_cross_entropy": 0.3})
    state.write_text(json.dumps({"log_history": log}))
    write_jsonl(folder / "answers.jsonl", [SAMPLE])
    ran = inside(
        *("report.py", "--results", folder, "--runs", run, folder / "runs" / "other-seed0"),
        *("--samples", folder / "answers.jsonl", "--expected_order", "distill", "mix", "sft"),
    )
    data = json.loads((folder / "report.json").read_text())
    return folder, ran, data, (folder / "report.md").read_text()
