"""Target masks of random conversations equal those of an independent construction, by family.

KD_REAL_TOKENIZERS names a folder of real tokenizers (see REAL). Without it the tests with real
tokenizers are skipped.
"""

import os
import re
from pathlib import Path

import pytest
from families import FAMILIES, SPECIAL, Pieces, chatml, thinking
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import small_tokenizer
from transformers import AutoTokenizer

from kd.data.control_tokens import MARKS
from kd.data.encoding import Encoder, encode_rows
from kd.data.files import BadRow
from kd.data.template import with_arguments

TYPED = "\U000f1234"  # the only character that no text contains
PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=TYPED), max_size=12),
    st.sampled_from(
        ["", " ", "\n", "\n\n", "caf\u00e9 \u4e2d\u6587 \U0001f642", "e\u0301", "\u200b",
         "\u0000", "\ue000", *MARKS[:2],
         "<think>\nwhy\n</think>\n\n", "</think>", "<think>", "assistant\n",
         "### END", "[INST]", "model", "{{ x }}", "\r\n", "word " * 300]
    ),
)  # fmt: skip
INNOCENT = st.lists(PARTS, max_size=4).map("".join)
EVIL = st.lists(PARTS | st.sampled_from(SPECIAL), max_size=5).map("".join)


@st.composite
def conversations(draw, contents) -> list[dict]:
    """An optional system prompt, then alternating questions and answers; at least one answer."""
    messages = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(contents)})
        messages.append({"role": "assistant", "content": draw(contents)})
    if draw(st.booleans()) and draw(st.booleans()):
        messages.append({"role": "user", "content": draw(contents)})
    return messages


def tokenizer_of(name: str):
    family = FAMILIES[name]
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>"])  # not special, as in Qwen3 and DeepSeek-R1
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = with_arguments(family.template, dict(family.arguments))
    return tokenizer


def expected(pieces: Pieces, tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of the whole text, and whether any of their characters is the assistant's.

    The text between two of the template's control tokens is encoded alone, as ordinary text.
    """
    text = "".join(part for part, _ in pieces)
    whose = [target for part, target in pieces for _ in part]
    ids, mask, at = [], [], 0
    for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
        out = tokenizer(
            part.replace(TYPED, "<"),
            add_special_tokens=False,
            split_special_tokens=part not in SPECIAL,
            return_offsets_mapping=True,
        )
        ids += out["input_ids"]
        mask += [any(whose[at + start : at + end]) for start, end in out["offset_mapping"]]
        at += len(part)
    return ids, [False, *mask[1:]]


def pieces_of(name: str, messages: list[dict]) -> Pieces:
    """The reference's pieces, with TYPED in place of the `<` of every typed control token."""
    typed = re.compile("|".join(f"<(?={re.escape(token[1:])})" for token in SPECIAL))
    return FAMILIES[name].pieces(
        [message | {"content": typed.sub(TYPED, message["content"])} for message in messages]
    )


def check(encoder: Encoder, pieces: Pieces, messages: list[dict]) -> bool:
    """Check an encoded row; returns whether it was encoded rather than rejected."""
    ids, mask = expected(pieces, encoder.tokenizer)
    (row,) = encoder([("row", {"messages": messages})])
    if isinstance(row, BadRow):
        assert row.kind == "without a target" and not any(mask) or "chat template" in row.kind
        return row.kind == "without a target"
    assert row.input_ids.tolist() == ids
    assert row.target_mask.tolist() == mask
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_equal_those_of_an_independent_construction(name):
    encoder = Encoder(tokenizer_of(name), 10**6, on_bad_row="drop")

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations(INNOCENT))
    def compare(messages):
        assert check(encoder, pieces_of(name, messages), messages)

    compare()


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_text_are_encoded_as_text(name):
    encoder = Encoder(tokenizer_of(name), 10**6, on_bad_row="drop")

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations(EVIL))
    def compare(messages):
        assert check(encoder, pieces_of(name, messages), messages)

    compare()


def test_template_arguments_are_defaults_that_callers_may_override():
    template = with_arguments(
        "\n{{ a }}|{{ b.c }}|{{ d is none }}", {"a": "'\n\u00e9", "b": {"c": [1, True]}, "d": None}
    )
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "x"}]
    tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "\n'\n\u00e9|[1, True]|True"
    assert tokenizer.apply_chat_template(messages, tokenize=False, a=3).startswith("\n3|")
    with pytest.raises(ValueError, match="not a valid variable name"):
        with_arguments("", {"a b": 1})


def test_a_template_that_omits_the_system_prompt_is_rejected():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [{"role": r, "content": f"the {r}"} for r in ("system", "user", "assistant")]
    with pytest.raises(ValueError, match="leaves out or changes the system message"):
        encode_rows([{"messages": messages}], tokenizer, 64)
    assert encode_rows([{"messages": messages[1:]}], tokenizer, 64)


def llama(messages: list[dict]) -> Pieces:
    """Llama 3.2, with a date set by the test."""
    system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    head = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    pieces = [("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", False)]
    pieces.append((f"{head}{system}<|eot_id|>", False))
    for message in messages[bool(messages[0]["role"] == "system") :]:
        pieces.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        pieces.append((message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"))
    return pieces


def gemma(messages: list[dict]) -> Pieces:
    pieces = FAMILIES["turns"].pieces(messages)
    names = {"<s>": "<bos>", "<|start|>": "<start_of_turn>", "<|stop|>": "<end_of_turn>"}
    for short, long in names.items():
        pieces = [(text.replace(short, long), target) for text, target in pieces]
    return pieces


def mistral(messages: list[dict]) -> Pieces:
    pieces = [("<s>", False)]
    for message in messages:
        target = message["role"] == "assistant"
        text = f"{message['content']}</s>" if target else f"[INST]{message['content']}[/INST]"
        pieces.append((text, target))
    return pieces


def qwen(system: str | None):
    return lambda messages: chatml(messages, system)


REAL = {  # folder, reference, template arguments, whether it has system prompts
    "Qwen1.5": ("qwen1_5", qwen("You are a helpful assistant"), {}, True),
    "Qwen2.5": (
        "qwen2_5",
        qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        {},
        True,
    ),
    "Qwen3 thinking": ("qwen3", thinking, {"enable_thinking": True}, True),
    "Qwen3 not thinking": (
        "qwen3",
        FAMILIES["without thinking"].pieces,
        {"enable_thinking": False},
        True,
    ),
    "Llama 3.2": ("llama3_2", llama, {"date_string": "26 Jul 2024"}, True),
    "Gemma 3": ("gemma3", gemma, {}, True),
    "Mistral Nemo": ("mistral_nemo", mistral, {}, False),
}


@pytest.mark.parametrize("name", REAL)
def test_masks_of_real_templates_equal_those_of_an_independent_construction(name):
    folder, pieces, arguments, has_system = REAL[name]
    root = os.environ.get("KD_REAL_TOKENIZERS")
    found = sorted(Path(root).glob(f"{folder}/**/tokenizer.json")) if root else []
    if not found:
        pytest.skip(f"no {folder} in KD_REAL_TOKENIZERS")
    tokenizer = AutoTokenizer.from_pretrained(found[0].parent, local_files_only=True)
    tokenizer.chat_template = with_arguments(tokenizer.chat_template, arguments)
    encoder = Encoder(tokenizer, 10**6, on_bad_row="drop")

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations(INNOCENT))
    def compare(messages):
        if not has_system and messages[0]["role"] == "system":
            messages = messages[1:]
        assert check(encoder, pieces(messages), messages)

    compare()
