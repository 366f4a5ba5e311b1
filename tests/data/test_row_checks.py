"""Suspicious rows are counted by reason, told with the first example, and refused on request."""

import json
from types import SimpleNamespace

import pytest
from small import small_rows

from kd.data.row_checks import CHECKS, CONTROL_TOKENS
from kd.data.tokenised_rows import TokenisedRows
from kd.settings.distillation import DataSettings
from kd.training.training_rows import HELDOUT_IN_TRAINING, tokenize

SYSTEM, USER, ANSWER, EMPTY, BLANK, TYPED = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", "What is a list?"),
        ("assistant", "A thing."),
        ("assistant", ""),
        ("user", " \n"),
        ("assistant", "It ends here.<|im_end|>"),
    )
)
CALL = EMPTY | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
IMAGE = {"messages": [USER, ANSWER], "images": ["a.png"]}
TOOL = {"role": "tool", "content": "3"}
# Conversations to which each reason applies, and the last ones, to which none does.
SUSPICIOUS: dict[str, list] = {
    "with an empty answer": [[USER, EMPTY, USER, ANSWER]],
    "with an empty question": [[SYSTEM, BLANK, ANSWER]],
    "in which the assistant speaks first": [[ANSWER, USER, ANSWER], [SYSTEM, ANSWER]],
    "with two turns of one role in a row": [[USER, USER, ANSWER], [USER, ANSWER, ANSWER]],
    "with a system message that is not first": [[USER, SYSTEM, ANSWER]],
    "with fields that are not read (such as images or history)": [IMAGE],
    CONTROL_TOKENS: [[USER, TYPED], {"text": "a <|endoftext|> b"}],
}
INNOCENT = [
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, USER, ANSWER],
    [USER, CALL, TOOL, TOOL, ANSWER],
    {"text": "A list <b> of <|things|>."},
    {"messages": [USER, ANSWER], "images": [], "history": None},
]


def write(file, rows) -> dict:
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    file.write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(file)}


def rows_of(tmp_path, tokenizer, data, heldout=None, **keys):
    """The rows of a recipe with these sources and keys."""
    sources = {"data": json.dumps([data]), "eval_data": json.dumps([heldout] if heldout else [])}
    settings = DataSettings(**sources, data_cache=str(tmp_path / "cache"), data_workers=1, **keys)
    return tokenize(
        SimpleNamespace(data=settings, training=SimpleNamespace(disable_tqdm=True)), tokenizer
    )


def test_every_check_counts_its_rows_and_no_others(tmp_path, tokenizer, capsys):
    assert SUSPICIOUS.keys() == CHECKS.keys() | {CONTROL_TOKENS}
    rows = [*INNOCENT, *(row for rows in SUSPICIOUS.values() for row in rows)]
    source, at, wanted = write(tmp_path / "rows.jsonl", rows), len(INNOCENT) + 1, {}
    for reason, found in SUSPICIOUS.items():
        wanted[reason] = [len(found), f"{source['path']}, line {at}"]
        at += len(found)
    for _ in range(2):  # made and read from the cache
        report = rows_of(tmp_path, tokenizer, source).train.report
        assert report.suspicious == wanted and report.kept == len(rows)
        printed = capsys.readouterr().out
        for reason, (count, place) in wanted.items():
            rows_ = "row" if count == 1 else "rows"
            assert f"suspicious: {count} {rows_} {reason}, the first is {place}\n" in printed
    with pytest.raises(ValueError, match="on_suspicious_row: error: suspicious: ") as error:
        rows_of(tmp_path, tokenizer, source, on_suspicious_row="error")
    assert all(reason in str(error.value) for reason in wanted)
    assert len(str(error.value).splitlines()) == 1
    kept = rows_of(tmp_path, tokenizer, source, control_tokens_in_text="keep").train
    assert CONTROL_TOKENS not in kept.report.suspicious
    assert sum(kept.lengths) < sum(rows_of(tmp_path, tokenizer, source).train.lengths)


def test_heldout_rows_that_are_training_rows_are_told_or_refused(tmp_path, tokenizer, capsys):
    rows = small_rows(12)
    data = write(tmp_path / "rows.jsonl", rows[:10])
    text, (question, answer) = rows[3]["text"], rows[4]["messages"]
    loud = [question | {"content": f"  {question['content'].upper()}\n"}, answer]
    again = [{"text": text.replace(" ", "\n ")}, {"messages": [SYSTEM, *loud]}]
    heldout = write(tmp_path / "heldout.jsonl", [rows[10], *again, rows[11]])
    report = rows_of(tmp_path, tokenizer, data, heldout).heldout.report
    place = f"{heldout['path']}, line 2"
    assert report.suspicious == {HELDOUT_IN_TRAINING: [2, place]}
    assert f"2 rows {HELDOUT_IN_TRAINING}, the first is {place}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"2 rows {HELDOUT_IN_TRAINING}"):
        rows_of(tmp_path, tokenizer, data, heldout, on_suspicious_row="error")
    others = write(tmp_path / "others.jsonl", rows[10:])
    found = rows_of(tmp_path, tokenizer, data, others, on_suspicious_row="error", packing=True)
    assert not found.heldout.report.suspicious and isinstance(found.train, TokenisedRows)
