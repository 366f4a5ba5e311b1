"""Bad data: files that are absent or unreadable, and rows that cannot be trained on.

tests/data/test_malformed.py has the table of bad rows of a file, which it reads without a script.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from mistakes.frame import GOOD, Case

DISTILL, SFT = "train/distill.py", "train/sft.py"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TEXT = '{"text": "a"}\n'


def folder(name: str):
    """Return a function that makes a folder of this name."""
    return lambda here: (here / name).mkdir()


def link(here: Path) -> None:
    (here / "rows.jsonl").symlink_to("gone.jsonl")


def pipe(here: Path) -> None:
    os.mkfifo(here / "rows.jsonl")


def parquet(table: dict):
    """Return a function that writes rows.parquet with these columns."""
    return lambda here: pq.write_table(pa.table(table), here / "rows.parquet")


# What a source names, its files, and what is told before anything is read.
PATHS: dict[str, tuple] = {
    "missing file": ("no.jsonl", {}, "no file no.jsonl"),
    "missing folder": ("HERE/rows", {}, "no file HERE/rows; wanted .jsonl"),
    "home folder": ("~/rows.jsonl", {}, "~ stands for nothing here, write the whole path"),
    "pattern of nothing": ("HERE/*.jsonl", {}, "no file matches HERE/*.jsonl"),
    "folder of notes": ("HERE/rows", {"rows/README.md": "a"}, "no such file, only {'.md': 1}"),
    "folder of two kinds": (
        "HERE/rows",
        {"rows/a.jsonl": TEXT, "rows/b.csv": "text\na\n"},
        "several kinds",
    ),
    "gzip": ("HERE/rows.jsonl.gz", {"rows.jsonl.gz": b"\x1f\x8b"}, "gz is compressed; unpack it"),
    "zip in a folder": ("HERE/d", {"d/a.jsonl": TEXT, "d/b.zip": b"PK"}, "b.zip is compressed"),
    "spreadsheet": ("HERE/a.xlsx", {"a.xlsx": b"PK\3\4"}, "a.xlsx is a file of another kind"),
    "long name": ("HERE/" + "a" * 3000, {}, "File name too long"),
    "path of a device": ("/dev/null", {}, "/dev/null is not a regular file"),
}
PREPARED: dict[str, tuple] = {
    "empty folder": ("rows.jsonl", folder("rows.jsonl"), "rows.jsonl has no file; wanted"),
    "dangling link": ("rows.jsonl", link, "rows.jsonl is a link to gone.jsonl, which is missing"),
    "named pipe": ("rows.jsonl", pipe, "rows.jsonl is not a regular file"),
    "parquet of numbers": ("rows.parquet", parquet({"text": [1.5]}), "row 0: text is float 1.5"),
    "parquet of other columns": ("rows.parquet", parquet({"a": ["b"]}), "row 0: fields ['a']"),
    "parquet without rows": ("rows.parquet", parquet({"text": []}), "no rows; wanted at least one"),
}
# A file, its content and what is told when it is read.
FILES: dict[str, tuple] = {
    "empty file": ("rows.jsonl", b"", "rows.jsonl: the file is empty"),
    "blank lines": ("rows.jsonl", "\n \n", "rows.jsonl: no rows"),
    "two lists": ("rows.json", f"[{TEXT}]\n[{TEXT}]", "line 3: a second list follows the list"),
    "text behind a list": ("rows.json", f"[{TEXT}] and", "line 2: 'and' follows the list"),
    "open list": ("rows.json", f"[{TEXT}", "not JSON: Expecting ',' or ']'"),
    "comma at the end": ("rows.json", f"[{TEXT},]", "rows.json, line 2: not JSON"),
    "one object": ("rows.json", '{\n"data": []}', "line 1: only '{' on the line; wanted one JSON"),
    "list in lines": ("rows.jsonl", f"[\n{TEXT}]", "line 1: only '[' on the line; wanted one JSON"),
    "list named jsonl": ("rows.jsonl", '[{"text": "a"}]', "JSON list is named .json"),
    "gzip named jsonl": ("rows.jsonl", b"\x1f\x8b\x08", "the file is gzip; unpack it first"),
    "UTF-16": ("rows.jsonl", TEXT.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
    "UTF-16 without mark": ("rows.jsonl", TEXT.encode("utf-16-le"), "the file is binary or UTF-16"),
    "Latin-1": ("rows.jsonl", b'{"text": "caf\xe9"}', "rows.jsonl, line 1: not UTF-8 at byte 13"),
    "NUL": ("rows.jsonl", TEXT.encode() + b"\0\0", "rows.jsonl, line 2: not JSON"),
    "pointer file": ("rows.jsonl", "version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "web page": ("rows.json", "<!DOCTYPE html>\n<html>", "the file is a web page"),
    "key twice": ("rows.jsonl", '{"text": "a", "text": "b"}', "key 'text' occurs twice"),
    "huge row": ("rows.jsonl", '{"text": "' + 2**24 * "a" + '"}', "line 1: the row is larger than"),
    "ragged CSV": ("rows.csv", "prompt,completion\na,b\na\n", "line 3: 1 cells; wanted 2"),
    "CSV of semicolons": ("rows.csv", "prompt;completion\na;b\n", "fields ['prompt;completion']"),
    "CSV of two equal columns": ("rows.csv", "text,text\na,b\n", "wanted a unique name for each"),
    "no Parquet": ("rows.parquet", b"PAR1 and nothing", "cannot be read as parquet"),
}
ROWS: dict[str, tuple] = {
    "row without fields": ({"answer": 1}, "fields ['answer']; wanted messages"),
    "text null": ({"text": None}, "fields ['text']; wanted messages"),
    "text a list": ({"text": ["a"]}, "text is list"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "and a content string"),
    "content a number": ({"messages": [USER, ANSWER | {"content": 3}]}, "and a content string"),
    "nested messages": ({"messages": [[USER, ANSWER]]}, "message is list"),
    "unknown role": ({"messages": [USER, {"role": "bot", "content": "b"}]}, "wanted a role of"),
    "image": (
        {"messages": [USER | {"content": [{"type": "image", "url": "a.png"}]}, ANSWER]},
        "content has a part of type image; wanted text alone",
    ),
    "no answer": ({"messages": [USER]}, "no assistant message"),
    "empty answer": (GOOD | {"completion": ""}, "every assistant message is empty"),
    "half a character": ({"text": "\ud83d"}, "not UTF-8"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
        "the field system and a system message",
    ),
}
# Keys of a source that reads rows.jsonl, which has one row.
SOURCES: dict[str, tuple] = {
    "unknown key of a source": ({"wieght": 1}, "unknown key wieght; did you mean weight"),
    "weight 0": ({"weight": 0}, "weight 0; wanted a number above 0"),
    "weight below 0": ({"weight": -1}, "weight -1; wanted a number above 0"),
    "weight a word": ({"weight": "much"}, "weight 'much'; wanted a number above 0"),
    "count 0": ({"count": 0}, "count 0; wanted a whole number above 0"),
    "count of a half": ({"count": 1.5}, "count 1.5; wanted a whole number above 0"),
    "count above the rows": ({"count": 2}, "count 2, but it has 1 rows"),
    "count and weight": ({"count": 1, "weight": 1}, "has count and weight; wanted one of them"),
    "split of a file": ({"split": "test"}, "split test, but this is a local file or folder"),
    "sample_by of JSON": ({"sample_by": "line"}, "sample_by has an effect on .txt files only"),
    "unknown column": ({"columns": {"txt": "a"}}, "unknown key txt; did you mean text"),
    "column twice": ({"columns": {"prompt": "a", "completion": "a"}}, "a is given twice"),
    "column that is absent": ({"columns": {"text": "body"}}, "fields ['completion', 'prompt']"),
    "unknown role of a source": ({"roles": {"bot": "robot"}}, "roles: 'robot'; wanted one of"),
    "filter without a row": ({"where": {"prompt": "z"}}, "none of its 1 rows has {'prompt': 'z'}"),
    "system a number": ({"system": 3}, "system 3; wanted a string"),
}
# Rows that are only told by default.
SUSPICIOUS: dict[str, tuple] = {
    "control token in an answer": (GOOD | {"completion": "b<|im_end|>"}, "with control tokens in"),
    "assistant first": ({"messages": [ANSWER, USER, ANSWER]}, "the assistant speaks first"),
    "empty question": (GOOD | {"prompt": " "}, "1 row with an empty question, the first is HERE/"),
    "images beside the text": (GOOD | {"images": ["a.png"]}, "with fields that are not read"),
}


def data(path: str, **keys) -> dict:
    return {"data": [{"path": path} | keys]}


CASES = [
    Case(
        "hub data set",
        DISTILL,
        "no/such_set, split train: no file or folder here, and as a hub data set it cannot be",
        data("no/such_set"),
    ),
    *(Case(name, DISTILL, text, data(path), files=f) for name, (path, f, text) in PATHS.items()),
    *(
        Case(name, SFT, text, data(f"HERE/{file}"), prepare=prepare)
        for name, (file, prepare, text) in PREPARED.items()
    ),
    *(
        Case(name, SFT, text, data(f"HERE/{file}"), files={file: content})
        for name, (file, content, text) in FILES.items()
    ),
    *(
        Case(name, SFT, text, data("HERE/rows.jsonl"), files={"rows.jsonl": [row]})
        for name, (row, text) in ROWS.items()
    ),
    *(
        Case(name, DISTILL, text, data("HERE/rows.jsonl", **keys), files={"rows.jsonl": [GOOD]})
        for name, (keys, text) in SOURCES.items()
    ),
    *(
        Case(
            name,
            SFT,
            text,
            data("HERE/rows.jsonl") | {"on_suspicious_row": "error"},
            files={"rows.jsonl": [row]},
        )
        for name, (row, text) in SUSPICIOUS.items()
    ),
    Case(
        "held-out row that is a training row",
        SFT,
        "rows of eval_data found in data as well, the first is WORK/rows.jsonl, line 1",
        {"eval_data": [{"path": "WORK/rows.jsonl"}], "on_suspicious_row": "error"},
    ),
    Case(
        "weights of a single row",
        SFT,
        "HERE/rows.jsonl: weight 1e-06 is too small for a single row",
        {
            "data": [{"path": "WORK/rows.jsonl", "weight": 1}]
            + [{"path": "HERE/rows.jsonl", "weight": 1e-6}]
        },
        files={"rows.jsonl": [GOOD]},
    ),
]
