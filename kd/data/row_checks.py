"""Checks of rows that can be trained on but are often mistakes.

They are counted by reason and told with the data summary; `on_suspicious_row: error` refuses them.
A check is a reason, which follows a number of rows, and a function that finds it in a row. To add
one, append it to CHECKS.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from kd.data.control_tokens import ControlTokens
from kd.data.conversations import UNREAD

Check = Callable[[dict], bool]  # a row of kd.data.conversations -> whether the reason applies
Suspicious = dict[str, list]  # reason -> [number of rows, place of the first one]


def empty(role: str) -> Check:
    """Return a check for messages of a role that are blank and call no tool."""
    return lambda row: any(
        m["role"] == role and not m["content"].strip() and "tool_calls" not in m
        for m in row.get("messages", ())
    )


def roles(row: dict) -> list[str]:
    """Return the roles of a conversation, in order; [] for a text."""
    return [message["role"] for message in row.get("messages", ())]


def assistant_first(row: dict) -> bool:
    """Whether nothing but system messages precedes an answer."""
    return next((role for role in roles(row) if role != "system"), "") == "assistant"


def repeated_role(row: dict) -> bool:
    """Whether two questions or two answers follow one another."""
    pairs = itertools.pairwise(roles(row))
    return any(a == b in ("user", "assistant") for a, b in pairs)


def late_system(row: dict) -> bool:
    """Whether a system message comes after another message."""
    return "system" in roles(row)[1:]


CHECKS: dict[str, Check] = {
    "with an empty answer": empty("assistant"),
    "with an empty question": empty("user"),
    "in which the assistant speaks first": assistant_first,
    "with two turns of one role in a row": repeated_role,
    "with a system message that is not first": late_system,
    "with fields that are not read (such as images or history)": lambda row: UNREAD in row,
}
CONTROL_TOKENS = (
    "with control tokens in their text, which are encoded as ordinary text "
    "(control_tokens_in_text: keep encodes them as control tokens)"
)


def checks_for(control_tokens: str, *tokenizers: PreTrainedTokenizerBase) -> dict[str, Check]:
    """Return all checks; the tokenizers' control tokens are found unless they are kept."""
    tokens = [ControlTokens(tokenizer, control_tokens) for tokenizer in tokenizers]
    return CHECKS | {CONTROL_TOKENS: lambda row: any(t.found_in(row) for t in tokens)}


def counted(
    rows: Iterable[tuple[str, dict]], checks: dict[str, Check], found: Suspicious
) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) pairs and count in `found` those to which a check applies."""
    for place, row in rows:
        for reason, check in checks.items():
            if check(row):
                found.setdefault(reason, [0, place])[0] += 1
        yield place, row


def row_key(row: dict) -> int:
    """Return a 64-bit hash of a row's text without regard to case, blanks and system prompt."""
    parts = [row["text"]] if "text" in row else []
    for message in row.get("messages", ()):
        if message["role"] != "system":
            calls = json.dumps(message.get("tool_calls", ""), sort_keys=True, default=str)
            parts.append(f"\n{message['role']}\n{message['content']}\n{calls}")
    normalised = " ".join("".join(parts).casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little")
