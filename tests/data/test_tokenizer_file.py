"""A tokenizer reads text, and cuts it as its tokenizer.json does, or the user is told."""

import json
from pathlib import Path

import pytest
from processes import ROOT
from small import save_small, small_tokenizer
from small_tokenizers import TOKENIZERS, check_cuts_as_its_file
from transformers import AutoConfig

from kd.data.tokenizer import load_tokenizer

SHIPPED = ROOT / "data" / "quickstart"


def save(folder: Path, tokenizer, model_type: str, **changes) -> str:
    """Save a tokenizer beside a configuration of a model type; `changes` of its own settings."""
    tokenizer.save_pretrained(folder)
    AutoConfig.for_model(model_type).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_shipped_tokenizers_cut_text_as_their_files_do(name, capsys):
    check_cuts_as_its_file(SHIPPED / name)
    assert not capsys.readouterr().out


def test_a_file_that_cuts_text_differently_is_told_in_one_line(tmp_path, capsys):
    """Transformers gives every model of type qwen2 the pre-tokenizer of Qwen."""
    name = str(save_small(tmp_path / "model"))
    capsys.readouterr()
    loaded = load_tokenizer(name)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {name}: Transformers cuts text in another way than")
    loaded.save_pretrained(tmp_path / "model")  # its tokenizer.json now has that pre-tokenizer
    check_cuts_as_its_file(tmp_path / "model")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "tokenizer, model_type, changes",
    [
        ("byte-level", "llama", {}),
        ("byte-level", "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        ("Llama 2's", "llama", {"tokenizer_class": "LlamaTokenizer"}),
        ("Llama 2's", "llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
        ("Llama 2's", "llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
        ("Gemma's", "gemma", {"tokenizer_class": "GemmaTokenizer"}),
        ("unigram", "mistral", {}),
    ],
)
def test_a_space_in_front_and_added_special_tokens_are_no_difference(
    tmp_path, capsys, tokenizer, model_type, changes
):
    name = save(tmp_path, TOKENIZERS[tokenizer], model_type, **changes)
    capsys.readouterr()
    load_tokenizer(name)
    assert not capsys.readouterr().out


def test_a_tokenizer_that_loses_what_its_file_keeps_is_refused(tmp_path):
    name = save(tmp_path, TOKENIZERS["Llama 2's"], "qwen2")
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer keeps \d+% .* but tokenizer.json 100%"):
        load_tokenizer(name)


def test_a_tokenizer_that_knows_no_letters_is_refused(tmp_path):
    """One that knows a single script is not."""
    digits = small_tokenizer(texts=["0123456789 " * 9], all_bytes=False)
    with pytest.raises(ValueError, match="keeps .*% of a plain sentence; wanted one with its voc"):
        load_tokenizer(save(tmp_path / "digits", digits, "llama"))
    letters = "".join(map(chr, range(0x410, 0x450)))
    russian = small_tokenizer(texts=[letters] * 9, all_bytes=False)
    load_tokenizer(save(tmp_path / "russian", russian, "llama"))
