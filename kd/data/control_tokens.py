"""Keep control tokens apart from text that only looks like them.

A chat template renders a conversation to one text, and the tokenizer turns `<|im_end|>` in it into
a control token, whoever wrote it. Here only the template writes control tokens: the same characters
in a message, a tool or a plain text are encoded as ordinary text. Tokens that the tokenizer does
not mark as special, such as `<think>` or `<tool_call>`, stay one token everywhere.

The row's own control tokens have other names while the template renders it: a mark, which is a
private-use character that the row does not contain, and a number. The control tokens that are then
left are the template's. They are encoded by a copy of the tokenizer that knows them by such names,
so everything around them is encoded as ever.
"""

import bisect
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase

from kd.data.template import Span, render

# Plane 16 of Unicode, which is for private use: its last characters are marks, the others numbers.
FIRST_NUMBER = 0x100000
MARKS = [chr(code) for code in range(0x10FFFD, 0x10FF00, -1)]
KEEP = (
    "remove it from the text, or, in training and evaluation, set control_tokens_in_text: keep if "
    "the rows mean their control tokens"
)


class ControlTokens:
    """The special tokens of a tokenizer, and the encoding of rows whose text contains them.

    `in_text`: `split` encodes them in the text of a row as ordinary text, `keep` as control tokens;
    then none is ever found.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, in_text: str = "split", mark: str = MARKS[0]
    ) -> None:
        self.tokenizer, self.mark = tokenizer, mark
        self.others: dict[str, ControlTokens] = {}  # by mark
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        known = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        found = [*special.items(), *known] if in_text == "split" else []
        self.ids = {text: i for text, i in found if text}
        self.names = {text: mark + chr(FIRST_NUMBER + i) for i, text in enumerate(self.ids)}
        longest_first = sorted(self.ids, key=len, reverse=True)  # as the tokenizer matches them
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def found_in(self, value: Any) -> str | None:
        """Return the first control token in a text, or in any text of lists and objects."""
        if not self.ids:
            return None
        if isinstance(value, str):
            found = self.pattern.search(value)
            return found[0] if found else None
        parts = value.values() if isinstance(value, dict) else value
        if not isinstance(value, dict | list):
            return None
        return next((token for part in parts if (token := self.found_in(part))), None)

    def clear_of(self, value: Any) -> "ControlTokens":
        """Return control tokens whose mark does not occur in a text, or in lists and objects.

        Raises ValueError if every mark occurs.
        """
        text = json.dumps(value, ensure_ascii=False, default=str)
        mark = next((mark for mark in MARKS if mark not in text), None)
        if mark is None:
            raise ValueError(f"found {MARKS[-1]!r} to {MARKS[0]!r} beside a control token; {KEEP}")
        if mark != self.mark and mark not in self.others:
            self.others[mark] = ControlTokens(self.tokenizer, mark=mark)
        return self.others.get(mark, self)

    def guarded(self, value: Any) -> Any:
        """Return texts, lists and objects with a name in place of every control token."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.names[match[0]], value)
        if isinstance(value, dict):
            return {key: self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, list) else value

    def restored(self, text: str) -> str:
        """Return a text with control tokens in place of their names."""
        for token, name in self.names.items() if self.mark in text else ():
            text = text.replace(name, token)
        return text

    def check_rendered(self, guarded: str, messages: list[dict], **kwargs: Any) -> None:
        """Raise ValueError if the template renders guarded messages in another way than these."""
        plain = render(messages, self.tokenizer, **kwargs)
        if self.restored(guarded) != plain or self.mark in plain:
            raise ValueError(
                f"it reads {self.found_in(messages)!r} in the text of a message, which is a "
                f"control token; {KEEP}"
            )

    def named(self, guarded: str, spans: list[Span] | None = None) -> tuple[str, list[Span]]:
        """Return a rendered text for `copy`, with its spans moved.

        The template's control tokens get names, and the names of the row's own become text again.
        """
        swapped = self.names | {name: token for token, name in self.names.items()}
        either = re.compile(f"{self.mark}.|{self.pattern.pattern}", re.DOTALL)
        parts, old, new = [], [0], [0]  # positions in the guarded and in the returned text
        for match in either.finditer(guarded):
            parts += [guarded[old[-1] : match.start()]]
            old.append(match.start())
            new.append(new[-1] + len(parts[-1]))
            parts += [swapped[match[0]]]
            old.append(match.end())
            new.append(new[-1] + len(parts[-1]))
        parts.append(guarded[old[-1] :])

        def moved(position: int) -> int:
            i = bisect.bisect_right(old, position) - 1
            return new[i] + position - old[i]

        return "".join(parts), [(moved(start), moved(end)) for start, end in spans or []]

    @cached_property
    def copy(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens.

        Raises ValueError if the names cannot stand for the same ids.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.tokenizer.name_or_path}: without a tokenizer.json control tokens cannot be "
                f"told from text; convert it (save_pretrained of a fast tokenizer), or {KEEP}"
            )
        spec = renamed(json.loads(self.tokenizer.backend_tokenizer.to_str()), self.names)
        copy = Tokenizer.from_str(json.dumps(spec))
        if any(copy.token_to_id(self.names[text]) != i for text, i in self.ids.items()):
            raise ValueError(
                f"{self.tokenizer.name_or_path}: its control tokens cannot be told from text; "
                f"{KEEP}"
            )
        return copy

    def encode_named(self, texts: Sequence[str]) -> BatchEncoding:
        """Encode texts of `named`. Raises ValueError if a control token of a template is lost."""
        found = self.copy.encode_batch(list(texts), add_special_tokens=False)
        special = set(self.ids.values())
        for text, encoding in zip(texts, found, strict=True):
            if sum(i in special for i in encoding.ids) < text.count(self.mark):
                raise ValueError(f"a control token of the chat template is lost; {KEEP}")
        return BatchEncoding({"input_ids": [encoding.ids for encoding in found]}, found)

    def encode_text(self, text: str) -> Encoding:
        """Encode a plain text, in which every control token is text."""
        return self.clear_of(text).copy.encode(text)

    def conversation_ids(self, messages: list[dict], **kwargs: Any) -> list[int]:
        """Render a conversation and return its ids, for example of a prompt to be answered.

        Raises ValueError as `check_rendered` does.
        """
        if not self.found_in(messages):  # the template has written the special tokens already
            text = render(messages, self.tokenizer, **kwargs)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        clear = self.clear_of(messages)
        text = render(clear.guarded(messages), self.tokenizer, **kwargs)
        clear.check_rendered(text, messages, **kwargs)
        return clear.encode_named([clear.named(text)[0]])["input_ids"][0]


def renamed(spec: dict, names: dict[str, str]) -> dict:
    """Return the contents of a tokenizer.json in which tokens have other names and the same ids.

    Merges that would make one of these tokens from ordinary text are left out.
    """
    new: Callable[[str], str] = lambda text: names.get(text, text)  # noqa: E731
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {new(token): i for token, i in vocab.items()}
    else:
        model["vocab"] = [[new(token), score] for token, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = new(model["unk_token"])
    if "merges" in model:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        kept = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
        model["merges"] = kept
    added = [token | {"content": new(token["content"])} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added, "truncation": None, "padding": None}
