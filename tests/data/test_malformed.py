"""Malformed rows and files give an error with file and line; rows can be dropped and counted."""

import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.data.files import LARGEST_ROW, BadRow
from kd.data.sources import check_sources, load_rows, read_rows

GOOD = b'{"text": "a good row"}'
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def chat(*messages) -> dict:
    return {"messages": list(messages)}


# Line 2 between two good rows: the kind that it is counted by, and a part of the message.
LINES: dict[str, tuple[object, str, str]] = {
    "an open brace": (b'{"text": "a"', "not JSON", "Expecting"),
    "an open string": (b'{"text": "a', "not JSON", "Unterminated string"),
    "no JSON": (b"text: a", "not JSON", "Expecting value"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON", "Extra data"),
    "a comma behind the last": (b'{"text": "a",}', "not JSON", "not JSON"),
    "single quotes": (b"{'text': 'a'}", "not JSON", "property name"),
    "a control character": (b'{"text": "a\x01"}', "not JSON", "control character"),
    "NaN": (b'{"text": "a", "score": NaN}', "not JSON", "NaN is not valid JSON"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "not JSON", "-Infinity is not valid JSON"),
    "a key twice": (b'{"text": "a", "text": "b"}', "not JSON", "key 'text' occurs twice"),
    "a number of 5000 digits": (b'{"n": ' + b"7" * 5000 + b"}", "not JSON", "not JSON"),
    "200000 brackets": (b"[" * 200_000, "not JSON", "not JSON"),
    "a list": (b"[1, 2]", "not an object", "found list; wanted a JSON object (a file that"),
    "a string": (b'"text"', "not an object", "found str"),
    "null": (b"null", "not an object", "found NoneType"),
    "a number": (b"3", "not an object", "found int"),
    "Latin-1": ('{"text": "caf\u00e9"}'.encode("latin-1"), "not UTF-8", "at byte 13"),
    "binary": (bytes([128, 0, 255, 1]), "not UTF-8", "at byte 0"),
    "NUL": (b"\0\0\0", "not JSON", "not JSON"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', "not UTF-8", "\\ud83d"),
    "a huge line": (b'{"text": "' + b"a" * LARGEST_ROW + b'"}', "too large", "larger than 16 MiB"),
    "an empty object": ({}, "missing fields", "fields []"),
    "other fields": ({"question": "a"}, "missing fields", "fields ['question']; wanted messages"),
    "prompt alone": ({"prompt": "a"}, "missing fields", "wanted messages"),
    "instruction alone": ({"instruction": "a"}, "missing fields", "wanted messages"),
    "all fields null": ({"text": None, "messages": None}, "missing fields", "wanted messages"),
    "an empty text": ({"text": ""}, "empty", "text is empty"),
    "blanks": ({"text": " \n\t "}, "empty", "text is empty"),
    "text a number": ({"text": 3}, "wrong type", "text is int 3; wanted a string"),
    "text a list": ({"text": ["a"]}, "wrong type", "text is list"),
    "messages a string": ({"messages": "a"}, "wrong type", "messages is str"),
    "messages an object": ({"messages": {"role": "user"}}, "wrong type", "messages is dict"),
    "messages half a list": ({"messages": "[{"}, "not JSON", "messages is not JSON"),
    "no messages": ({"messages": []}, "empty", "messages is an empty list"),
    "a message a string": (chat("a"), "wrong type", "message is str"),
    "a message null": (chat(None, ANSWER), "wrong type", "message is NoneType"),
    "no role": (chat({"content": "a"}, ANSWER), "unknown role", "wanted a role of system, user"),
    "an unknown role": (chat({"role": "bot", "content": "a"}), "unknown role", "wanted a role"),
    "role a number": (chat({"role": 1, "content": "a"}), "unknown role", "wanted a role"),
    "role a list": (chat({"role": ["user"], "content": "a"}), "unknown role", "wanted a role"),
    "no content": (chat(USER, {"role": "assistant"}), "wrong type", "and a content string"),
    "content null": (chat({"role": "user", "content": None}), "wrong type", "content string"),
    "content a number": (chat({"role": "user", "content": 1.5}), "wrong type", "content string"),
    "content an image": (
        chat({"role": "user", "content": [{"type": "image", "url": "a"}]}, ANSWER),
        "not text",
        "content has a part of type image; wanted text alone",
    ),
    "an image beside its caption": (
        chat({"role": "user", "content": [{"type": "image_url", "text": "a"}]}, ANSWER),
        "not text",
        "content has a part of type image_url",
    ),
    "a part of no text": (chat({"role": "user", "content": [1]}, ANSWER), "wrong type", "content"),
    "nested lists": (chat([[USER, ANSWER]]), "wrong type", "message is list"),
    "content an object": (chat({"role": "user", "content": {}}), "wrong type", "content string"),
    "content true": (chat({"role": "user", "content": True}), "wrong type", "content string"),
    "two system prompts": (
        chat({"role": "system", "content": "a"}, USER, ANSWER) | {"system": "b"},
        "two system prompts",
        "the field system and a system message",
    ),
    "a key twice in a message": (
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        "not JSON",
        "key 'role' occurs twice",
    ),
    "content an empty list": (chat({"role": "user", "content": []}), "wrong type", "content"),
    "no answer": (chat(USER), "no answer", "no assistant message; wanted at least one"),
    "only a system prompt": (chat({"role": "system", "content": "a"}), "no answer", "no assistant"),
    "an empty answer": (chat(USER, {"role": "assistant", "content": ""}), "empty", "is empty"),
    "tool calls a string": (chat(USER, ANSWER | {"tool_calls": "f()"}), "wrong type", "tool_calls"),
    "tool calls of strings": (chat(USER, ANSWER | {"tool_calls": ["f"]}), "wrong type", "objects"),
    "tools a string": (chat(USER, ANSWER) | {"tools": "search"}, "wrong type", "tools is str"),
    "ShareGPT of no one": ({"conversations": [{"value": "a"}]}, "unknown role", "wanted a role"),
    "ShareGPT without value": ({"conversations": [{"from": "gpt"}]}, "wrong type", "content"),
    "prompt a number": ({"prompt": 1, "completion": "b"}, "wrong type", "prompt is int 1"),
    "completion a number": ({"prompt": "a", "completion": 1}, "wrong type", "completion is int"),
    "an empty completion": ({"prompt": "a", "completion": " "}, "empty", "every assistant"),
    "Alpaca with a number": ({"instruction": 1, "output": "a"}, "wrong type", "instruction is"),
    "Alpaca without a word": ({"instruction": "a", "output": ""}, "empty", "every assistant"),
    "system a number": (chat(USER, ANSWER) | {"system": 3}, "wrong type", "content string"),
    "an id a second time": ({"text": "a", "id": "x"}, "repeated id", "line 1; wanted unique ids"),
}  # fmt: skip


def write_between(path, line) -> str:
    first = b'{"text": "a good row", "id": "x"}'
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(b"\n".join([first, line, GOOD]))
    return str(path)


def test_the_table_has_at_least_60_malformed_rows():
    assert len(LINES) >= 60


@pytest.mark.parametrize("name", LINES)
def test_a_bad_row_is_an_error_with_file_and_line_or_is_dropped_and_counted(tmp_path, name):
    line, kind, message = LINES[name]
    path = write_between(tmp_path / "bad.jsonl", line)
    with pytest.raises(BadRow) as error:
        load_rows([{"path": path}], seed=0)
    assert f"{path}, line 2: " in str(error.value) and message in str(error.value)
    assert len(str(error.value)) < 600
    dropped: Counter = Counter()
    rows = [row for _, row in read_rows([{"path": path}], 0, "drop", dropped)]
    assert rows == [{"text": "a good row"}] * 2 and dropped == {kind: 1}


@pytest.mark.parametrize(
    "start, end",
    [(b"\xef\xbb\xbf", b"\n"), (b"", b"\r\n"), (b"\xef\xbb\xbf", b"\r\n\r\n \t\r\n"),
     (b"\n", b"\n\n")],
    ids=["BOM", "CRLF", "BOM, CRLF and blank lines", "blank lines"],
)  # fmt: skip
def test_bom_crlf_and_blank_lines_are_allowed_and_lines_keep_their_numbers(tmp_path, start, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + GOOD + end + GOOD + end)
    assert load_rows([{"path": str(path)}], 0) == [{"text": "a good row"}] * 2
    path.write_bytes(start + GOOD + end + b"broken" + end)
    number = (start + GOOD + end).count(b"\n") + 1
    with pytest.raises(BadRow, match=f"rows.jsonl, line {number}: not JSON"):
        load_rows([{"path": str(path)}], 0)


FILES = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n \n", "no rows"),
    "empty.json": (b"[]", "no rows"),
    "empty.csv": (b"", "the file is empty"),
    "header.csv": (b"prompt,completion\n", "no rows"),
    "empty.txt": (b" \n", "no rows"),
    "gzip.jsonl": (b"\x1f\x8b\x08abc", "gzip; unpack it first"),
    "zip.json": (b"PK\x03\x04abc", "zip; unpack it first"),
    "parquet.jsonl": (b"PAR1abc", "Parquet; name it .parquet"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
    "open.json": (b'[{"text": "a"},\n{"text": "b"', "open.json, line 2: not JSON"),
    "latin.json": (b'[{"text":\n "caf\xe9"}]', "latin.json, line 2: not UTF-8"),
    "twice.csv": (b"text,text\na,b\n", "wanted a unique name for each"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "two.json, line 2: a second list follows"),
    "behind.json": (
        b'[{"text": "a"}] {"text": "b"}',
        """line 1: '{"text": "b"}' follows the list""",
    ),
    "comma.json": (b'[{"text": "a"},]', "comma.json, line 1: not JSON"),
    "commas.json": (b'[{"text": "a"},,{"text": "b"}]', "commas.json, line 1: not JSON"),
    "none.json": (
        b'[\n{"text": "a"}\n{"text": "b"}]',
        "none.json, line 3: not JSON: Expecting ','",
    ),
    "one.json": (
        b'{\n "data": [{"text": "a"}]\n}',
        "line 1: only '{' on the line; wanted one JSON",
    ),
    "list.jsonl": (
        b'[\n {"text": "a"}\n]',
        "line 1: only '\\[' on the line; wanted one JSON object",
    ),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16-le"), "binary or UTF-16; save it as UTF-8"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS; fetch"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS; fetch"),
    "page.json": (b"<!DOCTYPE html><html>", "a web page; download the file itself"),
    "not.parquet": (b"PAR1 and then nothing", "cannot be read as parquet"),
}


# The files of a folder, what the recipe names, and the reason why it cannot be read.
PATHS = {
    "an empty folder": ({}, "", "the folder .* has no file; wanted .jsonl"),
    "a folder of other kinds": (
        {"a.md": b"a", "b.pdf": b"b", ".a.jsonl": GOOD, ".b/a.jsonl": GOOD},
        "",
        "has no such file, only {'.md': 1, '.pdf': 1}; wanted",
    ),
    "an empty folder named as a file": ({"x.jsonl/.a": b""}, "x.jsonl", "x.jsonl has no file"),
    "gzip": ({"a.jsonl.gz": b"\x1f\x8b"}, "a.jsonl.gz", "a.jsonl.gz is compressed; unpack"),
    "gzip beside a file": ({"a.jsonl": GOOD, "b.jsonl.gz": b""}, "", "b.jsonl.gz is compressed"),
    "gzip, absent": ({}, "a.jsonl.gz", "no file .*a.jsonl.gz; wanted"),
    "mixed kinds": ({"a.jsonl": GOOD, "b.CSV": b"text"}, "", "several kinds, {'.*': 1, '.*': 1}"),
    "another kind": ({"a.xlsx": b"PK"}, "a.xlsx", "a.xlsx is a file of another kind; wanted"),
    "a pattern of nothing": ({"a.jsonl": GOOD}, "b*.jsonl", r"no file matches .*b\*.jsonl"),
    "a name of 5000 letters": ({}, "a" * 5000, "File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_path_without_rows_is_an_error_with_the_true_reason(tmp_path, name):
    files, path, message = PATHS[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        check_sources([{"path": f"{tmp_path}/{path}"}])
    assert len(str(error.value).splitlines()) == 1


def test_links_and_closed_and_special_files_are_errors(tmp_path, monkeypatch):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    for name, message in (
        ("link", "link.jsonl is a link to .*gone.jsonl, which is missing"),
        ("pipe", "pipe.jsonl is not a regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sources([{"path": str(tmp_path / f"{name}.jsonl")}])
    check_sources([{"path": str(tmp_path / "rows.jsonl")}])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read every file
    with pytest.raises(ValueError, match="rows.jsonl: no permission to read it"):
        check_sources([{"path": str(tmp_path / "rows.jsonl")}])


def test_endings_in_capitals_and_files_named_like_patterns_are_read(tmp_path):
    for name, content in (("A.JSONL", GOOD), ("b[1].jsonl", GOOD), ("c.TSV", b"text\tid\na\tb\n")):
        (tmp_path / name).write_bytes(content)
        assert len(load_rows([{"path": str(tmp_path / name)}], 0)) == 1
    (tmp_path / "c.TSV").unlink()
    assert len(load_rows([{"path": str(tmp_path)}], 0)) == 2


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_an_error_even_if_bad_rows_are_dropped(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows([{"path": str(tmp_path / name)}], 0, "drop")


@pytest.mark.parametrize(
    "line, kind, message",
    [
        (b"a,b,c", "not CSV", "line 2: 3 cells; wanted 2, as in the header"),
        (b"a", "not CSV", "line 2: 1 cells"),
        (b'"a"b,c', "not CSV", "line 2: not CSV"),
        (b"caf\xe9,b", "not UTF-8", "line 2: not UTF-8"),
        (b"a,", "empty", "line 2: every assistant message is empty"),
    ],
)
def test_a_bad_line_of_a_csv_file_is_reported_or_dropped(tmp_path, line, kind, message):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + line + b'\n"why,\nso?",because\n')
    with pytest.raises(BadRow, match=message):
        load_rows([{"path": str(path)}], 0)
    dropped: Counter = Counter()
    ((place, row),) = read_rows([{"path": str(path)}], 0, "drop", dropped)
    assert [m["content"] for m in row["messages"]] == ["why,\nso?", "because"]
    assert dropped == {kind: 1} and place.endswith("line 3")


def test_bad_items_of_a_json_list_and_of_parquet_are_reported(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n\n {"txt": "b"}\n]')
    with pytest.raises(BadRow, match=r"a.json, line 4: fields \['txt'\]"):
        load_rows([{"path": str(tmp_path / "a.json")}], 0)
    table = pa.table({"text": ["a", None, float("nan") and "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadRow, match="a.parquet, row 1: fields"):
        load_rows([{"path": str(tmp_path / "a.parquet")}], 0)
    pq.write_table(pa.table({"text": [1.5, float("nan")]}), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match="b.parquet, row 0: text is float 1.5; wanted a string"):
        load_rows([{"path": str(tmp_path / "b.parquet")}], 0)


def test_a_count_is_exact_even_if_drawn_rows_are_dropped(tmp_path):
    lines = [json.dumps({"text": f"row {i}"}) if i % 3 else "broken" for i in range(60)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    dropped: Counter = Counter()
    source = {"path": str(path), "count": 40}
    rows = [row["text"] for _, row in read_rows([source], 0, "drop", dropped)]
    assert len(rows) == len(set(rows)) == 40 and 0 < dropped["not JSON"] <= 20
    assert rows == [row["text"] for _, row in read_rows([source], 0, "drop")]
    with pytest.raises(ValueError, match="count 41, but of 60 rows only 40 can be used"):
        load_rows([source | {"count": 41}], 0, "drop")
