"""Sources to rows: mixtures by count, and errors that name file and line."""

import json

import pytest

from kd.data.sources import load_rows

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path, rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_mixture_has_exactly_the_counts_and_repeats_no_row(tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": f"text {i}"} for i in range(50)])
    chat = write(
        tmp_path / "chat.jsonl", [{"prompt": f"p {i}", "completion": "c"} for i in range(9)]
    )
    sources = [{"path": text, "count": 20}, {"path": chat, "count": 7}]
    rows = load_rows(sources, seed=0)
    texts = [row["text"] for row in rows if "text" in row]
    prompts = [row["messages"][0]["content"] for row in rows if "messages" in row]
    assert (len(set(texts)), len(set(prompts)), len(rows)) == (20, 7, 27)
    assert load_rows(sources, seed=0) == rows != load_rows(sources, seed=1)


def test_columns_are_mapped_and_a_missing_system_prompt_is_added(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "why", "a": "so"}])
    source = {"path": path, "columns": {"prompt": "q", "completion": "a"}, "system": "Be short."}
    (row,) = load_rows([source], seed=0)
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == "why"


@pytest.mark.parametrize(
    "rows, message",
    [
        ([CHAT, {"question": "a"}], r"bad.jsonl, line 2: fields \['question'\]; wanted messages"),
        ([CHAT, "", "{broken"], "bad.jsonl, line 3: not JSON"),
        ([[1, 2]], "line 1: found list"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: no assistant message"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "wanted a role of system, user"),
        ([{"messages": [{"role": "assistant", "content": None}]}], "and a content string"),
        ([{"text": "  "}], "line 1: fields"),
        ([], "no rows"),
    ],
)
def test_bad_rows_name_their_file_and_line(tmp_path, rows, message):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_rows([{"path": path}], seed=0)


@pytest.mark.parametrize(
    "source, message",
    [
        ({"path": "missing.jsonl"}, "no file missing.jsonl"),
        ({"pth": "a.jsonl"}, "unknown key pth; did you mean path"),
        ({"count": 3}, "a source without path"),
        ({"path": "a/hub", "count": 0}, "wanted a whole number above 0"),
    ],
)
def test_wrong_sources_are_stopped_with_the_reason(source, message):
    with pytest.raises(ValueError, match=message):
        load_rows([source], seed=0)


def test_more_rows_than_there_are_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(ValueError, match="count 2, but it has 1 rows"):
        load_rows([{"path": path, "count": 2}], seed=0)
