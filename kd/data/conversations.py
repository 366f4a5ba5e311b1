"""Raw rows to {"messages": [...]} or {"text": ...}, whatever their data set calls its fields.

A row is one of these, looked for in this order; `columns` maps other names to ours:
    messages             [{role, content}, ...], tool calls and tool turns kept; tools beside it
    conversations        [{from, value}, ...] (ShareGPT)
    prompt, completion   two strings, or two lists of messages
    instruction, output  and, where it is not empty, input (Alpaca)
    text                 a string
"""

import json
from typing import Any

from kd.data.files import STRICT_JSON, BadRow

KINDS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
BESIDE = ("input", "tools", "system", "role", "content", "id")
COLUMNS = (*(key for keys in KINDS.values() for key in keys), *BESIDE)
ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
WANTED = (
    "messages, conversations, prompt and completion, instruction and output, or text "
    "(columns: {text: its_name} maps other names)"
)


def to_row(raw: dict, source: dict, place: str) -> dict:
    """One row in our form. Raises BadRow where there is nothing to learn in it."""
    fields = Fields(raw, source)
    kind = fields.kind(KINDS)
    if kind == "text":
        text = fields["text"]
        if not isinstance(text, str):
            raise BadRow(place, "wrong type", f"text is {shown(text)}; wanted a string")
        if not text.strip():
            raise BadRow(place, "empty", f"fields {sorted(map(str, raw))}, and text is empty")
        check_text(text, place)
        return {"text": text}
    if kind is None:
        found = f"fields {sorted(map(str, raw))}; wanted {WANTED}"
        raise BadRow(place, "missing fields", found)
    row = {"messages": fields.messages(kind, place)}
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    if not answers:
        raise BadRow(place, "no answer", "no assistant message, so nothing to learn")
    if not any(message["content"].strip() or "tool_calls" in message for message in answers):
        raise BadRow(place, "empty", "every assistant message is empty, so nothing to learn")
    tools = fields.parsed("tools", place)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(place, "wrong type", f"tools is {shown(tools)}; wanted a list of objects")
        row["tools"] = without_none(tools)
    return row


def to_prompt(raw: dict, source: dict, place: str) -> dict:
    """The messages before the first answer, and that answer where there is one.

    Raises BadRow where there is no question.
    """
    fields = Fields(raw, source)
    kind = fields.kind(KINDS | {"prompt": ("prompt",), "instruction": ("instruction",)})
    if kind in (None, "text"):
        found = f"fields {sorted(map(str, raw))}; wanted messages or prompt "
        raise BadRow(place, "missing fields", found + "(columns: {prompt: its_name} maps others)")
    messages = fields.messages(kind, place)
    answered = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    first = next(answered, len(messages))
    answer = messages[first]["content"] if first < len(messages) else None
    messages = messages[:first]
    if not any(message["role"] == "user" for message in messages):
        found = "no user message before the first answer, so nothing to ask"
        raise BadRow(place, "no question", found)
    return {"messages": messages, "answer": answer}


class Fields:
    """A raw row under our names."""

    def __init__(self, raw: dict, source: dict) -> None:
        self.raw, self.source = raw, source
        self.columns = source.get("columns", {})

    def __getitem__(self, key: str) -> Any:
        return self.raw.get(self.columns.get(key, key))

    def kind(self, kinds: dict[str, tuple[str, ...]]) -> str | None:
        """The first kind whose fields are all there; where columns name some, only of those."""
        named = [kind for kind, keys in kinds.items() if set(keys) & set(self.columns)]
        for kind in named or kinds:
            if all(self[key] is not None for key in kinds[kind]):
                return kind
        return None

    def parsed(self, key: str, place: str) -> Any:
        """A field whose list may be spelt as JSON, as it has to be in a CSV file."""
        value = self[key]
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return STRICT_JSON.decode(value)
            except (ValueError, RecursionError) as error:
                raise BadRow(place, "not JSON", f"{key} is not JSON: {error}") from error
        return value

    def messages(self, kind: str, place: str) -> list[dict]:
        """The conversation, a system prompt of the row or of the source in front."""
        messages = []
        if kind in ("messages", "conversations"):
            messages = self.turns(kind, place)
        elif kind == "prompt":
            for key, role in (("prompt", "user"), ("completion", "assistant")):
                if self[key] is not None:
                    messages += self.turns(key, place, role)
        else:
            parts = [self.string(key, place) for key in ("instruction", "input")]
            question = "\n\n".join(part for part in parts if part)
            messages = [self.message({"role": "user", "content": question}, place)]
            if self["output"] is not None:
                answer = {"role": "assistant", "content": self["output"]}
                messages.append(self.message(answer, place))
        system = self["system"] or self.source.get("system")
        if system and messages[0]["role"] != "system":
            messages.insert(0, self.message({"role": "system", "content": system}, place))
        return messages

    def string(self, key: str, place: str) -> str:
        value = "" if self[key] is None else self[key]
        if not isinstance(value, str):
            raise BadRow(place, "wrong type", f"{key} is {shown(value)}; wanted a string")
        return value

    def turns(self, key: str, place: str, role: str | None = None) -> list[dict]:
        """The messages of a field; one of `role` where the field is a string and may be one."""
        value = self.parsed(key, place)
        if role and isinstance(value, str):
            return [self.message({"role": role, "content": value}, place)]
        if not isinstance(value, list):
            raise BadRow(place, "wrong type", f"{key} is {shown(value)}; wanted a list of messages")
        if not value:
            raise BadRow(place, "empty", f"{key} is an empty list")
        return [self.message(message, place) for message in value]

    def message(self, raw: Any, place: str) -> dict:
        """{"role", "content", and what else a template may read}."""
        wanted = f"message {shown(raw)}; wanted a role of {', '.join(ROLES)} and a content string"
        if not isinstance(raw, dict):
            raise BadRow(place, "wrong type", wanted)
        names = [self.columns.get(key, key) for key in ("role", "content")]
        message = {key: value for key, value in raw.items() if value is not None}
        role = message.pop(names[0], None) or message.pop("from", None)
        content = message.pop(names[1], None)
        content = message.pop("value", None) if content is None else content
        role = self.source.get("roles", {}).get(role, role) if isinstance(role, str) else None
        role = OTHER_ROLES.get(role, role)
        if role not in ROLES:
            raise BadRow(place, "unknown role", wanted)
        calls = self.calls(message, place)
        if isinstance(content, list):
            content = joined_parts(content)
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise BadRow(place, "wrong type", wanted)
        check_text(content, place)
        return {"role": role, "content": content, **message, **calls}

    def calls(self, message: dict, place: str) -> dict:
        calls = message.pop("tool_calls", None)
        if not calls:
            return {}
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            found = f"tool_calls is {shown(calls)}; wanted a list of objects"
            raise BadRow(place, "wrong type", found)
        return {"tool_calls": without_none(calls)}


def joined_parts(parts: list) -> str | None:
    """Content as a list of {"type": "text", "text": ...}; None where there is any other part."""
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def without_none(value: Any) -> Any:
    """Arrow gives every object the keys of all others, with None where it has none."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"not UTF-8: {text[error.start : error.end]!r} at character {error.start}"
        raise BadRow(place, "not UTF-8", found) from error


def shown(value: Any) -> str:
    """A value and its type, short enough for a message."""
    return f"{type(value).__name__} {json.dumps(value, default=str)[:80]}"
