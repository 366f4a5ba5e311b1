"""Targets: assistant turns with their end token, all of a text, never a row's first token."""

import pytest
from small import CHATML, small_tokenizer
from tokenizers import processors

from kd.data.encoding import IGNORE_INDEX, NO_TARGET, encode_rows

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list? <b>"},
    {"role": "assistant", "content": "A thing in order."},
    {"role": "user", "content": "And?\n\n"},
    {"role": "assistant", "content": "Names find it \u00e9\u4e2d."},
]
WITH_MARKERS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def targets(row, tokenizer) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("template", [CHATML, WITH_MARKERS])
def test_targets_of_a_chat_are_all_answers_with_their_end_tokens(tokenizer, template):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    (row,), report = encode_rows([{"messages": CONVERSATION}], tokenizer, 512)
    assert targets(row, tokenizer) == (
        "A thing in order.<|im_end|>Names find it \u00e9\u4e2d.<|im_end|>"
    )
    assert report.targets == row.targets and report.tokens == len(row)


def test_targets_of_a_text_are_all_tokens_but_the_first_plus_an_end_token(tokenizer):
    (row,), _ = encode_rows([{"text": "A list keeps things."}], tokenizer, 512)
    assert row.labels[0] == IGNORE_INDEX and (row.labels[1:] == row.input_ids[1:]).all()
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_the_end_token_is_a_target_if_it_is_also_the_padding_token():
    tokenizer = small_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    (row,), _ = encode_rows([{"messages": CONVERSATION}], tokenizer, 512)
    assert (row.labels == tokenizer.eos_token_id).sum() == 2


def test_rows_without_a_target_are_dropped_and_counted(tokenizer):
    rows = [{"messages": CONVERSATION}, {"text": "A list keeps things in order."}]
    kept, report = encode_rows(rows, tokenizer, 12)
    assert (report.read, report.kept, report.cut) == (2, 1, 1)
    assert report.dropped == {NO_TARGET: 1}
    assert "1 dropped (without a target)" in str(report) and len(kept[0]) == 12
    with pytest.raises(ValueError, match="no row with a target token is left"):
        encode_rows(rows[:1], tokenizer, 12)


def test_a_template_that_rewrites_earlier_turns_is_rejected():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_rows([{"messages": CONVERSATION}], tokenizer, 512)


def test_chat_rows_without_a_template_are_rejected():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_rows([{"messages": CONVERSATION}], tokenizer, 512)


def test_an_end_token_that_the_tokenizer_appends_is_not_repeated():
    tokenizer = small_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        "$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer("A list")["input_ids"][-1] == tokenizer.eos_token_id
    (row,), _ = encode_rows([{"text": "A list keeps things."}], tokenizer, 512)
    (plain,), _ = encode_rows([{"text": "A list keeps things."}], small_tokenizer(), 512)
    assert row == plain and (row.input_ids == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize("spare", [-9, -1, 0, 1])
def test_a_long_row_keeps_its_first_or_last_tokens_or_is_dropped(tokenizer, spare):
    """max_length equals the row's length, or differs from it by one or more tokens."""
    text = [{"text": "A list keeps things in order, and a dictionary finds them by names."}]
    (whole,), _ = encode_rows(text, tokenizer, 512)
    length = len(whole) + spare
    for way, kept in (("cut", slice(length)), ("cut_left", slice(max(-spare, 0), None))):
        (row,), report = encode_rows(text, tokenizer, length, on_long_row=way)
        assert row.input_ids.tolist() == whole.input_ids[kept].tolist()
        assert row.labels.tolist() == [IGNORE_INDEX, *row.input_ids[1:]]
        lost = spare < 0
        assert (report.cut, report.targets_cut, report.kept) == (lost, lost, 1)
    if spare < 0:
        with pytest.raises(ValueError, match=r"1 dropped \(longer than max_length\)"):
            encode_rows(text, tokenizer, length, on_long_row="drop")
    else:
        (row,), _ = encode_rows(text, tokenizer, length, on_long_row="drop")
        assert row == whole


def test_targets_cut_counts_only_rows_that_lose_a_target(tokenizer):
    """At first only the question is cut."""
    (whole,), _ = encode_rows([{"messages": CONVERSATION}], tokenizer, 512)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    found = {}
    for length in (len(whole) - first + 1, len(whole) - first):
        (row,), report = encode_rows(
            [{"messages": CONVERSATION}], tokenizer, length, on_long_row="cut_left"
        )
        found[length] = (report.cut, report.targets_cut, whole.targets - row.targets)
    assert list(found.values()) == [(1, 0, 0), (1, 1, 1)]


WITH_TOOLS = (
    "{% for tool in tools or [] %}tool {{ tool['function']['name'] }}\n{% endfor %}" + CHATML
)


@pytest.mark.parametrize("template", [WITH_TOOLS, WITH_TOOLS[: -len(CHATML)] + WITH_MARKERS])
def test_tools_and_their_results_are_rendered_but_are_no_targets(template):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    messages = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": "sunny", "name": "weather"},
        {"role": "assistant", "content": "It is fine."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    (row,), _ = encode_rows([{"messages": messages, "tools": tools}], tokenizer, 512)
    text = tokenizer.decode(row.input_ids)
    assert text.startswith("tool weather\n") and "sunny" in text
    assert targets(row, tokenizer) == "I look.<|im_end|>It is fine.<|im_end|>"
