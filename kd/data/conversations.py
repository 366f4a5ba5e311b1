"""Convert raw rows to {"messages": [...]} or {"text": ...}, whatever their fields are called.

The first format in this list whose fields a row has is used. The `columns` of a source map other
field names to these:
    messages             [{role, content}, ...]; tool calls and tool turns are kept; `tools` is an
                         optional field
    conversations        [{from, value}, ...] (ShareGPT)
    prompt, completion   two strings, or two lists of messages
    instruction, output  and, if it is not empty, input (Alpaca)
    text                 a string
"""

import json
from typing import Any

from kd.data.files import STRICT_JSON, BadRow

FORMATS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL_FIELDS = ("input", "tools", "system", "role", "content", "id")
COLUMNS = (*(key for keys in FORMATS.values() for key in keys), *OPTIONAL_FIELDS)
ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {
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
# Fields of a row or a message that other programs train on and nothing here reads.
UNREAD_FIELDS = ("image", "images", "video", "videos", "audio", "audios", "history")
UNREAD = "unread"  # the key of a converted row that names those that it had
TEXT_PARTS = (None, "text", "input_text", "output_text")
KNOWN_FORMATS = (
    "messages, conversations, prompt and completion, instruction and output, or text "
    "(columns: {text: its_name} maps other names)"
)


def to_row(raw: dict, source: dict, place: str) -> dict:
    """Convert one row to messages or text. Raises BadRow if it has nothing to train on."""
    fields = Fields(raw, source)
    kind = fields.format(FORMATS)
    unread = fields.unread()
    if kind == "text":
        return _text_row(fields["text"], raw, place) | unread
    if kind is None:
        found = f"fields {sorted(map(str, raw))}; wanted {KNOWN_FORMATS}"
        raise BadRow(place, "missing fields", found)
    row = {"messages": fields.messages(kind, place)} | unread
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    if not answers:
        raise BadRow(place, "no answer", "no assistant message; wanted at least one to train on")
    if not any(message["content"].strip() or "tool_calls" in message for message in answers):
        found = "every assistant message is empty; wanted at least one to train on"
        raise BadRow(place, "empty", found)
    tools = fields.list_or_json("tools", place)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(place, "wrong type", f"tools is {shown(tools)}; wanted a list of objects")
        row["tools"] = without_none(tools)
    return row


def _text_row(text: Any, raw: dict, place: str) -> dict:
    if not isinstance(text, str):
        raise BadRow(place, "wrong type", f"text is {shown(text)}; wanted a string")
    if not text.strip():
        raise BadRow(place, "empty", f"text is empty; the row has fields {sorted(map(str, raw))}")
    check_text(text, place)
    return {"text": text}


def to_prompt(raw: dict, source: dict, place: str) -> dict:
    """Return the messages before the first answer, and that answer, or None without one.

    Raises BadRow if there is no user message to answer.
    """
    fields = Fields(raw, source)
    kind = fields.format(FORMATS | {"prompt": ("prompt",), "instruction": ("instruction",)})
    if kind in (None, "text"):
        found = f"fields {sorted(map(str, raw))}; wanted messages, conversations, prompt or "
        found += "instruction (columns: {prompt: its_name} maps other names)"
        raise BadRow(place, "missing fields", found)
    messages = fields.messages(kind, place)
    answered = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    first = next(answered, len(messages))
    answer = messages[first]["content"] if first < len(messages) else None
    messages = messages[:first]
    if not any(message["role"] == "user" for message in messages):
        found = "no user message before the first assistant message; wanted a prompt"
        raise BadRow(place, "no question", found)
    return {"messages": messages, "answer": answer}


class Fields:
    """A raw row, read under our field names. Methods raise BadRow at `place` for a wrong value."""

    def __init__(self, raw: dict, source: dict) -> None:
        self.raw, self.source = raw, source
        self.columns = source.get("columns", {})

    def __getitem__(self, key: str) -> Any:
        return self.raw.get(self.columns.get(key, key))

    def format(self, formats: dict[str, tuple[str, ...]]) -> str | None:
        """Return the first format whose fields are all present, or None.

        If `columns` maps fields of some formats, only those are considered.
        """
        named = [name for name, keys in formats.items() if set(keys) & set(self.columns)]
        for name in named or formats:
            if all(self[key] is not None for key in formats[name]):
                return name
        return None

    def unread(self) -> dict:
        """Return the fields that hold something nothing here reads, as part of a row."""
        messages = self["messages"] if isinstance(self["messages"], list) else []
        objects = [self.raw, *(message for message in messages if isinstance(message, dict))]
        names = [name for name in UNREAD_FIELDS if any(found.get(name) for found in objects)]
        names = [name for name in names if name not in self.columns.values()]
        return {UNREAD: names} if names else {}

    def list_or_json(self, key: str, place: str) -> Any:
        """Return a field; a list may be given as JSON text, as in a CSV file."""
        value = self[key]
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                return STRICT_JSON.decode(value)
            except (ValueError, RecursionError) as error:
                raise BadRow(place, "not JSON", f"{key} is not JSON: {error}") from error
        return value

    def messages(self, kind: str, place: str) -> list[dict]:
        """Return the conversation; a system prompt of the row or the source comes first."""
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
        own, system = self["system"], self["system"] or self.source.get("system")
        if system and messages[0]["role"] != "system":
            messages.insert(0, self.message({"role": "system", "content": system}, place))
        if own and messages[0]["content"] != own:
            found = "the field system and a system message; wanted one of them"
            raise BadRow(place, "two system prompts", found)
        return messages

    def string(self, key: str, place: str) -> str:
        """Return a string field; an absent one is empty."""
        value = "" if self[key] is None else self[key]
        if not isinstance(value, str):
            raise BadRow(place, "wrong type", f"{key} is {shown(value)}; wanted a string")
        return value

    def turns(self, key: str, place: str, role: str | None = None) -> list[dict]:
        """Return the messages of a field; a plain string is one message of `role`, if given."""
        value = self.list_or_json(key, place)
        if role and isinstance(value, str):
            return [self.message({"role": role, "content": value}, place)]
        if not isinstance(value, list):
            raise BadRow(place, "wrong type", f"{key} is {shown(value)}; wanted a list of messages")
        if not value:
            raise BadRow(place, "empty", f"{key} is an empty list; wanted at least one message")
        return [self.message(message, place) for message in value]

    def message(self, raw: Any, place: str) -> dict:
        """Return {"role", "content"} and the other keys of a message that a template may read."""
        wrong = f"message is {shown(raw)}; wanted a role of {', '.join(ROLES)} and a content string"
        if not isinstance(raw, dict):
            raise BadRow(place, "wrong type", wrong)
        names = [self.columns.get(key, key) for key in ("role", "content")]
        message = {key: value for key, value in raw.items() if value is not None}
        role = message.pop(names[0], None) or message.pop("from", None)
        content = message.pop(names[1], None)
        content = message.pop("value", None) if content is None else content
        role = self.source.get("roles", {}).get(role, role) if isinstance(role, str) else None
        role = ROLE_ALIASES.get(role, role)
        if role not in ROLES:
            raise BadRow(place, "unknown role", wrong)
        calls = _tool_calls(message, place)
        if isinstance(content, list):
            content = joined_parts(content, place)
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise BadRow(place, "wrong type", wrong)
        check_text(content, place)
        return {"role": role, "content": content, **message, **calls}


def _tool_calls(message: dict, place: str) -> dict:
    """Take the tool calls out of a message; returns {} without any."""
    calls = message.pop("tool_calls", None)
    if not calls:
        return {}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        found = f"tool_calls is {shown(calls)}; wanted a list of objects"
        raise BadRow(place, "wrong type", found)
    return {"tool_calls": without_none(calls)}


def joined_parts(parts: list, place: str) -> str | None:
    """Join content of the form [{"type": "text", "text": ...}, ...]; None if a part has no text.

    Raises BadRow for an image or anything else that is not text.
    """
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    other = next((kind for kind in kinds if kind not in TEXT_PARTS), None)
    if other is not None:
        found = f"content has a part of type {other}; wanted text alone, which is all that is read"
        raise BadRow(place, "not text", found)
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    return "".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def without_none(value: Any) -> Any:
    """Remove keys whose value is None, at any depth: Arrow gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def check_text(text: str, place: str) -> None:
    """Raise BadRow if the text cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"not UTF-8: {text[error.start : error.end]!r} at character {error.start}"
        raise BadRow(place, "not UTF-8", found) from error


def shown(value: Any) -> str:
    """Return the type and the beginning of a value, for an error message."""
    return f"{type(value).__name__} {json.dumps(value, default=str)[:80]}"
