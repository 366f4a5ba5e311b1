"""Rows of a recipe's sources, each as {"messages": [...]} or {"text": ...}.

Keys of one source:
    path      a local JSON-lines file, or the name of a hub data set
    name, split   configuration and split of a hub data set (split: train by default)
    count     rows to draw, by `mixture_seed`; without: all
    columns   {our name: its name}, for rows that call their fields otherwise
    system    a system prompt put in front of rows that have none
Fields that make a row: messages (a list of role/content), prompt + completion, or text.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from kd.recipe import unknown_key

KEYS = ("path", "name", "split", "count", "columns", "system")
LOCAL_ENDINGS = (".jsonl", ".json")
ROLES = ("system", "user", "assistant", "tool")


def check_sources(sources: list[dict]) -> None:
    """Refuse wrong keys and missing files before anything is loaded. Raises ValueError."""
    for source in sources:
        for key in source:
            if key not in KEYS:
                raise ValueError(f"data: {unknown_key(key, list(KEYS))}")
        path = source.get("path")
        if not isinstance(path, str):
            raise ValueError(f"data: a source without path: {source}")
        count = source.get("count", 1)
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"data: {path}: count {count!r}; wanted a whole number above 0")
        if is_local(path) and not Path(path).is_file():
            raise ValueError(f"data: no file {path}; wanted JSON lines, or the name of a data set")


def is_local(path: str) -> bool:
    return path.endswith(LOCAL_ENDINGS)


def load_rows(sources: list[dict], seed: int) -> list[dict]:
    """All rows of a mixture, source after source; the Trainer's sampler shuffles them.

    Raises ValueError naming file and line where a row has no usable fields.
    """
    check_sources(sources)
    return [row for source in sources for row in source_rows(source, seed)]


def source_rows(source: dict, seed: int, convert: Callable[..., dict] | None = None) -> list[dict]:
    path, columns = source["path"], source.get("columns", {})
    raw, place = read_jsonl(path) if is_local(path) else read_hub(source)
    chosen = range(len(raw))
    if "count" in source:
        if source["count"] > len(raw):
            raise ValueError(f"data: {path}: count {source['count']}, but it has {len(raw)} rows")
        # Path in the seed: two sources of equal length do not draw the same numbers.
        chosen = random.Random(f"{seed} {path}").sample(chosen, source["count"])
    convert = convert or to_row
    return [convert(raw[i], columns, source.get("system"), place(i)) for i in chosen]


def read_jsonl(path: str) -> tuple[list[dict], Callable[[int], str]]:
    rows, lines = [], []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: found {type(row).__name__}; wanted {{}}")
            rows.append(row)
            lines.append(number)
    if not rows:
        raise ValueError(f"{path}: no rows; wanted one JSON object a line")
    return rows, lambda i: f"{path}, line {lines[i]}"


def read_hub(source: dict) -> tuple[Iterable, Callable[[int], str]]:
    from datasets import load_dataset  # seconds to import, and local files do without

    split = source.get("split", "train")
    rows = load_dataset(source["path"], source.get("name"), split=split)
    return rows, lambda i: f"{source['path']}, {split} row {i}"


def to_row(raw: dict, columns: dict[str, str], system: str | None, place: str) -> dict:
    """One row in our form. Raises ValueError naming `place` where fields are missing or empty."""
    get = lambda key: raw.get(columns.get(key, key))  # noqa: E731
    if get("messages") is not None:
        messages = [dict(message) for message in get("messages")]
    elif get("prompt") is not None and get("completion") is not None:
        messages = [
            {"role": "user", "content": get("prompt")},
            {"role": "assistant", "content": get("completion")},
        ]
    elif isinstance(get("text"), str) and get("text").strip():
        return {"text": get("text")}
    else:
        raise ValueError(
            f"{place}: fields {sorted(raw)}; wanted messages, prompt and completion, or text "
            "(columns: {text: its_name} maps other names)"
        )
    check_messages(messages, place)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place}: no assistant message, so nothing to learn")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def to_prompt(raw: dict, columns: dict[str, str], system: str | None, place: str) -> dict:
    """The messages before the first answer, and that answer where there is one.

    Raises ValueError where there is no question.
    """
    get = lambda key: raw.get(columns.get(key, key))  # noqa: E731
    answer = get("completion")
    if get("messages") is not None:
        messages = [dict(message) for message in get("messages")]
    elif get("prompt") is not None:
        messages = [{"role": "user", "content": get("prompt")}]
    else:
        raise ValueError(
            f"{place}: fields {sorted(raw)}; wanted messages or prompt "
            "(columns: {prompt: its_name} maps other names)"
        )
    check_messages(messages, place)
    answered = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    first = next(answered, len(messages))
    if first < len(messages):
        answer = messages[first]["content"]
    messages = messages[:first]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{place}: no user message before the first answer, so nothing to ask")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "answer": answer}


def check_messages(messages: list[dict], place: str) -> None:
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"{place}: message {str(message)[:80]}; wanted a role of {', '.join(ROLES)} "
                "and a content string"
            )
