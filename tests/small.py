"""Small real models, a tokenizer and rows for the tests. Nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "A list keeps things in order, and a dictionary finds them by their names.",
    "Nobody reads a log until the day on which it is the only witness.",
    "Grown-ups call it caching when they do not want to do the same work twice.",
    "The river was low that summer, and the mill stood still for nine weeks.",
    "What is measured on one machine is a rumour on the next one.",
]


def small_tokenizer(
    vocab_size: int = 320,
    texts: list[str] = TEXT,
    eos_token: str = "<|im_end|>",
    all_bytes: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template; with `all_bytes` it knows every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if all_bytes else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def small_config(vocab_size: int, hidden: int = 32, **changes) -> Qwen2Config:
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
    }
    return Qwen2Config(**shape | changes)


def small_model(tokenizer, hidden: int = 32, seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """A random Qwen2 model. Its vocabulary is padded beyond the tokenizer's, as in real models."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": len(tokenizer) + 7,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,  # far from uniform, so that mistakes change the numbers
    }
    return Qwen2ForCausalLM(small_config(hidden=hidden, **defaults | changes))


def save_small(folder: Path, tokenizer=None, **model) -> Path:
    """Save a model and its tokenizer in a folder, laid out like a hub repository."""
    tokenizer = tokenizer or small_tokenizer()
    small_model(tokenizer, **model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_rows(count: int) -> list[dict]:
    """Plain-text and chat rows of very different lengths, alternating."""
    rows = []
    for i in range(count):
        text = " ".join(TEXT[j % len(TEXT)] for j in range(i, i + 1 + i % 3))
        if i % 2:
            rows.append({"text": text})
            continue
        question = {"role": "user", "content": f"Say something about {text.split()[1]}."}
        rows.append({"messages": [question, {"role": "assistant", "content": text}]})
    return rows


def save_reward_model(folder: Path, tokenizer, labels: int = 1) -> Path:
    """Save a random sequence classifier; with one output it is a reward model."""
    torch.manual_seed(3)
    config = small_config(
        len(tokenizer),
        num_labels=labels,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
