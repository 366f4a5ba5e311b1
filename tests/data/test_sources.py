"""Sources to rows: every format, mapped columns, mixtures by count and by weight."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from processes import ROOT

from kd.data.conversations import to_prompt
from kd.data.sources import load_rows, read_rows, shares

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
    "source, message",
    [
        ({"path": "missing.jsonl"}, "no file missing.jsonl"),
        ({"pth": "a.jsonl"}, "unknown key pth; did you mean path"),
        ({"count": 3}, "has no path; wanted a file"),
        ({"path": "a/hub", "count": 0}, "wanted a whole number above 0"),
        ({"path": "a/hub", "count": True}, "wanted a whole number above 0"),
        ({"path": "a/hub", "weight": 0}, "weight 0; wanted a number above 0"),
        ({"path": "a/hub", "weight": 1, "count": 1}, "wanted one of them"),
        ({"path": "a/hub", "columns": {"txt": "a"}}, "unknown key txt; did you mean text"),
        ({"path": "a/hub", "columns": {"text": None}}, "wanted the name of a column"),
        ({"path": "a/hub", "weight": float("inf")}, "weight inf; wanted a number above 0"),
        ({"path": "a/hub", "weight": float("nan")}, "weight nan; wanted a number above 0"),
        ({"path": "a/hub", "weight": "1e-4"}, "weight '1e-4'; wanted a number above 0"),
        ({"path": "a/hub", "columns": {"prompt": "a", "completion": "a"}}, "a is given twice"),
        ({"path": ["a", "b"]}, "has no path; wanted a file"),
        ({"path": "README.md"}, "README.md is a file of another kind"),
        ({"path": "~/rows.jsonl"}, "~ stands for nothing here, write the whole path"),
        ({"path": "recipes/*.jsonl"}, "no file matches recipes/"),
        ({"path": "recipes/own_data/", "count": 1}, "no such file, only {'.yaml'"),
        ({"path": "a/hub", "columns": "text"}, "wanted a mapping {name: name}"),
        ({"path": "a/hub", "roles": {"bot": "robot"}}, "wanted one of system, user"),
        ({"path": "a/hub", "sample_by": "page"}, "wanted line, paragraph or document"),
        ({"path": "a/hub", "name": 3}, "name 3; wanted a string"),
        ({"path": "./a/folder"}, "no file ./a/folder"),
    ],
)
def test_a_wrong_source_is_an_error_with_the_reason(source, message):
    with pytest.raises(ValueError, match=message):
        load_rows([source], seed=0)


def test_a_count_of_more_rows_than_the_source_has_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [CHAT])
    with pytest.raises(ValueError, match="count 2, but it has 1 rows"):
        load_rows([{"path": path, "count": 2}], seed=0)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CHATS = {
    "ShareGPT": {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
    },
    "a list of prompts": {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    },
    "a system column": {"prompt": "a", "completion": "b", "system": "s"},
    "messages as JSON": {
        "messages": json.dumps(
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        )
    },
    "parts": {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "model", "content": "b"},
        ]
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_every_format_of_conversations_becomes_messages(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [CHATS[name]])
    (row,) = load_rows([{"path": path}], 0)
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_alpaca_rows_join_instruction_and_input(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
    ]
    found = load_rows([{"path": write(tmp_path / "a.jsonl", rows)}], 0)
    questions = [row["messages"][0]["content"] for row in found]
    assert questions == ["Add.\n\n1 and 2", "Say hello."]


def test_tool_calls_tool_turns_and_tools_are_kept(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "b", "reasoning_content": "because"},
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": messages, "tools": [tool]}])
    (row,) = load_rows([{"path": path}], 0)
    assert row["tools"] == [tool]
    assert row["messages"] == [messages[0], messages[1] | {"content": ""}, *messages[2:]]


def test_no_none_of_an_arrow_table_reaches_a_template(tmp_path):
    """Arrow gives every object the keys of all others, with None as value."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [CALL]},
            ]
        }
    ]
    rows += [
        {
            "messages": [
                {"role": "user", "content": "a", "name": "n"},
                {"role": "assistant", "content": "b"},
            ]
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    one, two = load_rows([{"path": str(tmp_path / "a.parquet")}], 0)
    assert one["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert two["messages"][1] == {"role": "assistant", "content": "b"}


def test_roles_and_columns_of_messages_are_mapped(tmp_path):
    row = {"dialogue": [{"who": "Kunde", "says": "a"}, {"who": "Bot", "says": "b"}]}
    source = {
        "path": write(tmp_path / "a.jsonl", [row]),
        "columns": {"messages": "dialogue", "role": "who", "content": "says"},
        "roles": {"Kunde": "user", "Bot": "assistant"},
    }
    (found,) = load_rows([source], 0)
    assert found["messages"] == [USER, ANSWER]


def test_columns_select_the_format_of_a_row_with_several(tmp_path):
    path = write(tmp_path / "a.jsonl", [CHAT | {"article": "long"}])
    assert load_rows([{"path": path, "columns": {"text": "article"}}], 0) == [{"text": "long"}]
    assert load_rows([{"path": path}], 0) == [CHAT]


USER, ANSWER = CHAT["messages"]
RECORDS = [
    {"prompt": f"why {i}, and\n how?", "completion": f"so {i} \u00e9\u4e2d"} for i in range(7)
]


def write_records(folder, kind) -> str:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(RECORDS)
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            lines = csv.DictWriter(file, list(RECORDS[0]), delimiter="\t" if kind == "tsv" else ",")
            lines.writeheader()
            lines.writerows(RECORDS)
    elif kind == "json":
        path.write_text(json.dumps(RECORDS, indent=2), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = write_records(tmp_path, kind)
    wanted = load_rows([{"path": write_records(tmp_path, "jsonl")}], 0)
    assert load_rows([{"path": path}], 0) == wanted
    some = load_rows([{"path": path, "count": 3}], 0)
    assert len(some) == 3 and all(row in wanted for row in some)


def test_a_folder_or_pattern_reads_its_files_in_order(tmp_path):
    (tmp_path / "inner").mkdir()
    write(tmp_path / "b.jsonl", [{"text": "2"}, {"text": "3"}])
    write(tmp_path / "a.jsonl", [{"text": "1"}])
    write(tmp_path / "inner" / "c.jsonl", [{"text": "4"}])
    (tmp_path / "README.md").write_text("no rows")
    texts = lambda path: [row["text"] for row in load_rows([{"path": str(path)}], 0)]  # noqa: E731
    assert texts(tmp_path) == ["1", "2", "3", "4"]
    assert texts(tmp_path / "[ab].jsonl") == ["1", "2", "3"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["1", "2", "3", "4"]
    write_records(tmp_path, "csv")
    with pytest.raises(ValueError, match="several kinds.*wanted one kind"):
        texts(tmp_path)


@pytest.mark.parametrize(
    "sample_by, wanted",
    [
        ("line", ["one", "two", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("document", ["one\ntwo\n\n\nthree"]),
    ],
)
def test_text_files_by_line_paragraph_or_document(tmp_path, sample_by, wanted):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree\r\n")
    source = {"path": str(path), "sample_by": sample_by}
    assert [row["text"] for row in load_rows([source], 0)] == wanted
    assert list(read_rows([source], 0))[-1][0].endswith("line 1" if len(wanted) == 1 else "line 5")


def test_repeated_ids_are_an_error_unless_the_recipe_allows_them(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "id": 1}, {"text": "b", "id": 1}])
    assert len(load_rows([{"path": path, "columns": {"id": None}}], 0)) == 2
    with pytest.raises(ValueError, match="line 2: id 1 is also the id of .*line 1"):
        load_rows([{"path": path}], 0)
    write(tmp_path / "a.jsonl", [{"text": "a", "id": 0}, {"text": "b", "id": 0}])
    with pytest.raises(ValueError, match="line 2: id 0 is also the id of .*line 1"):
        load_rows([{"path": path}], 0)
    write(tmp_path / "a.jsonl", [{"text": "a", "id": ""}, {"text": "b", "id": ""}])
    assert len(load_rows([{"path": path}], 0)) == 2  # empty ids are none


def test_weights_give_exact_shares_and_repeat_no_row(tmp_path):
    sources = [
        {
            "path": write(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}"} for i in range(n)]),
            "weight": w,
        }
        for n, w in ((50, 3), (10, 1), (99, 0.5))
    ]
    count = lambda **k: [  # noqa: E731
        [row["text"].split()[0] for _, row in read_rows(sources, 0, **k)].count(name)
        for name in ("50", "10", "99")
    ]
    assert count() == [30, 10, 5]  # limited by the ten rows of the second source
    assert count(mixture_rows=9) == [6, 2, 1]
    assert count(mixture_rows=9, train_rows=3) == [2, 1, 0]
    with pytest.raises(ValueError, match="count 11, but it has 10 rows"):
        count(mixture_rows=49)
    with pytest.raises(ValueError, match="no source has a weight"):
        list(read_rows([{"path": sources[0]["path"]}], 0, mixture_rows=5))
    assert shares(10, [1, 1, 1]) == [4, 3, 3]


A_TEACHER = ROOT / "recipes" / "a_qwen2.5_1.5b_to_0.5b" / "1_teacher.yaml"
COLUMNS_OF_THE_HUB = {  # of the data sets that experiment A names
    "ccdv/arxiv-summarization": {"article": "t", "abstract": "t"},
    "wikimedia/wikipedia": {"id": "1", "url": "u", "title": "t", "text": "t"},
    "Vikhrmodels/GrandMaster-PRO-MAX": {"conversation": CHAT["messages"], "source": "s"},
    "HuggingFaceH4/no_robots": {"prompt": "p", "prompt_id": "1", "messages": CHAT["messages"]},
    "camel-ai": {"role_1": "r", "topic;": "t", "message_1": "a", "message_2": "b"},
    "qwedsacf/competition_math": {"problem": "a", "level": "1", "solution": "b"},
    "taesiri/arxiv_qa": {"paper_id": "1", "question": "a", "answer": "b"},
    "allenai/sciq": {"question": "a", "correct_answer": "b", "support": "s"},
}


def test_experiment_a_reads_exactly_its_counts(monkeypatch):
    """80 000 articles, a fifth of them Russian, and 10 300 instructions; then 20 000 questions."""
    sizes = {"ccdv/arxiv-summarization": 64_500, "wikimedia/wikipedia": 16_100}

    def hub(path, name=None, split="train", revision=None):
        columns = COLUMNS_OF_THE_HUB.get(path) or COLUMNS_OF_THE_HUB[path.split("/")[0]]
        rows = sizes.get(path, 11_700)
        table = {key: [value] * rows for key, value in columns.items()}
        if "id" in table:
            table["id"] = [str(i) for i in range(rows)]
        return datasets.Dataset.from_dict(table)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    recipe = yaml.safe_load(A_TEACHER.read_text())
    places = [place.split(",")[0] for place, _ in read_rows(recipe["data"], 0)]
    counts = {name: places.count(name) for name in dict.fromkeys(places)}
    assert sum(counts.values()) == 90_300
    assert counts.pop("ccdv/arxiv-summarization") == 64_000
    assert counts.pop("wikimedia/wikipedia") == 16_000
    assert counts == {
        "Vikhrmodels/GrandMaster-PRO-MAX": 6_000,
        "HuggingFaceH4/no_robots": 1_000,
        "camel-ai/chemistry": 1_000,
        "camel-ai/physics": 1_000,
        "camel-ai/biology": 1_000,
        "qwedsacf/competition_math": 200,
        "taesiri/arxiv_qa": 100,
    }
    assert len(load_rows(recipe["eval_data"], 0)) == 100
    answers = yaml.safe_load((A_TEACHER.parent / "2_answers.yaml").read_text())
    questions = [load_rows([source], 0, convert=to_prompt) for source in answers["prompts"]]
    assert sum(map(len, questions)) == 20_000


def test_where_filters_rows_and_count_draws_from_the_rest(tmp_path):
    path = tmp_path / "rows.jsonl"
    languages = ["ru", "en", "zh", "ru", "ru"]
    rows = [json.dumps({"text": f"{i}", "language": x}) for i, x in enumerate(languages)]
    path.write_text("\n".join(rows) + "\n")
    source = {"path": str(path), "where": {"language": "ru"}}
    assert load_rows([source], 0) == [{"text": "0"}, {"text": "3"}, {"text": "4"}]
    assert len(load_rows([source | {"count": 2}], 0)) == 2
    with pytest.raises(ValueError, match="count 4, but it has 3 rows"):
        load_rows([source | {"count": 4}], 0)
    with pytest.raises(ValueError, match="none of its 5 rows has {'language': 'fr'}"):
        load_rows([source | {"where": {"language": "fr"}}], 0)
    with pytest.raises(ValueError, match="where 'ru'; wanted"):
        load_rows([source | {"where": "ru"}], 0)


@pytest.mark.parametrize("bad", [None, "a row"])
def test_the_drawn_rows_depend_on_seed_and_source(tmp_path, bad):
    """Files of equal length must not give the same indices; bad rows are replaced."""
    rows = [{"text": f"{i}" if i % 3 or not bad else None} for i in range(300)]
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name in "ab"]

    def drawn(path, seed) -> tuple[str, ...]:
        found = read_rows([{"path": path, "count": 60}], seed, on_bad_row="drop")
        return tuple(row["text"] for _, row in found)

    found = {(path, seed): drawn(path, seed) for path in paths for seed in (0, 1)}
    assert len(set(found.values())) == 4
    for key, texts in found.items():
        assert drawn(*key) == texts and len(set(texts)) == 60
