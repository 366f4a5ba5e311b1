"""Held-out rows are encoded as in training; rolling text has every token as a target."""

import copy
import json

import pytest
from held_out import MAX_LENGTH, TEXTS, inside, write_jsonl
from tokenizers import processors
from transformers import AutoTokenizer

from kd.data.encoding import IGNORE_INDEX, encode_rows
from kd.evaluation.rows import encode_heldout, load_sources


@pytest.fixture(scope="module")
def tokenizer(house):
    return AutoTokenizer.from_pretrained(house / "student")


def test_control_tokens_in_text_are_read_as_the_training_read_them(house, tokenizer, tmp_path):
    """The tokens are those of `Encoder`; another choice is another measurement."""
    text = {"text": "one<|im_end|>two"}
    write_jsonl(tmp_path / "rows.jsonl", [text, {"prompt": "why<|im_end|>", "completion": "so"}])
    flags = ["--models", f"student={house / 'student'}", "--out_dir", tmp_path]
    flags += ["--data", json.dumps([{"path": str(tmp_path / "rows.jsonl")}])]
    targets = {}
    for in_text in ("split", "keep"):
        inside("perplexity.py", *flags, "--control_tokens_in_text", in_text)
        found = json.loads((tmp_path / "perplexity/student.json").read_text())
        assert found["settings"]["control_tokens_in_text"] == in_text
        raw = load_sources([{"path": str(tmp_path / "rows.jsonl")}], 0)
        rows = encode_heldout(raw, tokenizer, MAX_LENGTH, control_tokens=in_text)
        wanted, _ = encode_rows(raw["rows"], tokenizer, MAX_LENGTH, control_tokens=in_text)
        assert [row.windows[0].input_ids.tolist() for row in rows] == [
            row.input_ids.tolist() for row in wanted
        ]
        targets[in_text] = [row["tokens"] for row in found["rows"]]
        assert targets[in_text] == [row.targets for row in wanted]
        assert rows[0].bytes == len(text["text"]) - len(tokenizer.tokenize(text["text"])[0])
    assert targets["split"][0] > targets["keep"][0]  # the text; both chats have the same answer


def test_a_bos_token_that_the_tokenizer_adds_is_no_target_of_rolling_windows(tokenizer):
    """Every token of the text is a target once, whether or not the tokenizer adds a BOS token."""
    begin, end = "<|im_start|>", "<|im_end|>"
    raw = {"text": [{"text": TEXTS[0]}]}
    plain = encode_heldout(raw, tokenizer, MAX_LENGTH, rolling=True)
    sequences = {}
    for written in (False, True):
        changed = copy.deepcopy(tokenizer)
        changed.bos_token, changed.eos_token = begin, end
        if written:
            changed._tokenizer.post_processor = processors.TemplateProcessing(
                f"{begin} $A", special_tokens=[(begin, changed.bos_token_id)]
            )
        (row,) = encode_heldout(raw, changed, MAX_LENGTH, rolling=True)
        (window,) = row.windows
        assert window.input_ids[0] == changed.bos_token_id and window.labels[0] == IGNORE_INDEX
        assert (window.labels[1:] == plain[0].windows[0].labels[1:]).all()
        assert row.bytes == len(TEXTS[0].encode())
        sequences[written] = window.input_ids.tolist()
    assert sequences[False] == sequences[True]
