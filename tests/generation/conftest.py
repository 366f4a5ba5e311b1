"""A tiny Qwen2 with random weights, its tokenizer and prompts, all created without network."""

import json
from pathlib import Path

import pytest
from small import save_small, small_tokenizer
from transformers import PreTrainedTokenizerFast

WORDS = [
    "what",
    "is",
    "a",
    "list",
    "map",
    "set",
    "tree",
    "node",
    "key",
    "value",
    "loop",
    "sort",
    "join",
    "file",
    "line",
]


@pytest.fixture(scope="session")
def prompts() -> list[list[dict]]:
    """Forty conversations of different lengths; every other one has its own system prompt."""
    found = []
    for i in range(40):
        words = " ".join(WORDS[(i * k) % len(WORDS)] for k in range(2, 4 + i % 7))
        own = [{"role": "system", "content": f"be kind {i % 3}"}] if i % 2 else []
        found.append([*own, {"role": "user", "content": f"{words} {i}?"}])
    return found


@pytest.fixture(scope="session")
def prompts_file(prompts: list[list[dict]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prompts as chat rows with an answer, which generation must drop."""
    path = tmp_path_factory.mktemp("prompts") / "chat.jsonl"
    old = {"role": "assistant", "content": "an old answer"}
    path.write_text("".join(json.dumps({"messages": [*p, old]}) + "\n" for p in prompts))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small vocabulary, so that random weights emit the end token within a few dozen tokens."""
    texts = [" ".join(WORDS), "0123456789?.\n", "system user assistant be kind answer briefly"]
    return small_tokenizer(64, texts, eos_token="<|endoftext|>", all_bytes=False)


@pytest.fixture(scope="session")
def teacher(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose generation_config lists EOS but not the end token of the template."""
    return save_small(
        tmp_path_factory.mktemp("models") / "teacher",
        tokenizer,
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        max_position_embeddings=256,
        initializer_range=0.15,
    )
