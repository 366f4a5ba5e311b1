"""Find the characters of a rendered conversation that the assistant wrote.

A template with generation markers reports them itself. With any other template the conversation is
rendered twice, the second time with a placeholder in place of every assistant message. The text
around the placeholders belongs to the template and the other roles; the text that the first
rendering has in their places is the assistant's. Every character of the first rendering must be
accounted for in exactly one way.
"""

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from kd.data.render_limit import limit_rendering

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACEHOLDERS = range(0xE000, 0xF8FF)  # private-use code points, which texts hardly ever contain
Span = tuple[int, int]  # half-open range of characters or tokens
# (messages, tools) -> (the rendered conversation, the spans of the assistant's turns)
SpanFinder = Callable[[list[dict], list | None], tuple[str, list[Span]]]


def render(messages: list[dict], tokenizer: PreTrainedTokenizerBase, **kwargs) -> str:
    """Render messages as text with the tokenizer's chat template.

    Raises ValueError for a template that loops forever.
    """
    with limit_rendering(tokenizer.name_or_path):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def with_arguments(template: str, arguments: dict) -> str:
    """Prepend defaults for a template's variables, so that they are saved with the template.

    Raises ValueError if a name is not a valid variable name.
    """
    lines = []
    for name, value in arguments.items():
        if not name.isidentifier():
            raise ValueError(f"template_arguments: {name!r} is not a valid variable name")
        lines.append(f"{{%- set {name} = {name} if {name} is defined else {literal(value)} %}}\n")
    return "".join(lines) + template  # Jinja's trim_blocks removes the newlines


def literal(value: object) -> str:
    """Return a JSON value in Jinja's syntax."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def writes_the_date(template: str) -> bool:
    """Whether the template inserts today's date, so that its rows change every day.

    Llama 3.1 and later do, in the system prompt.
    """
    return "strftime_now" in template and "set date_string = date_string if" not in template


def span_finder(tokenizer: PreTrainedTokenizerBase) -> SpanFinder:
    """Return a function that renders a conversation and finds the assistant's turns in it.

    Raises ValueError if the tokenizer has no template or no tokenizer.json, or if the template
    rewrites earlier turns; the returned function raises ValueError for a conversation in which the
    turns cannot be found.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: the data has chat rows, and the tokenizer has no chat "
            "template; set chat_template to a file with one"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{tokenizer.name_or_path}: without a tokenizer.json it is unknown which characters a "
            "token covers; convert it (save_pretrained of a fast tokenizer)"
        )
    if GENERATION.search(tokenizer.get_chat_template()):
        return lambda messages, tools: spans_by_markers(messages, tools, tokenizer)
    return AssistantTurns(tokenizer).spans


class AssistantTurns:
    """Finds the assistant's turns in renderings of a template without generation markers.

    Raises ValueError if the template does not render one turn after the other.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        placeholder, user = chr(PLACEHOLDERS[0]), {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": placeholder}
        prompt = render([user], tokenizer, add_generation_prompt=True)
        pieces = render([user, answer, user, answer], tokenizer).split(placeholder)
        if len(pieces) != 3:
            raise self._error("it does not render every answer once")
        # The generation prompt, and its part that also precedes earlier answers. Qwen3 without
        # thinking writes an empty thought into the prompt, but only into the last turn.
        begin = common_prefix(prompt, render([user], tokenizer))
        self.prompt = prompt[begin:]
        self.header = prompt[begin : common_prefix(prompt, pieces[0])]
        if not self.header and not pieces[0].startswith(prompt):
            raise self._error("its generation prompt differs from the text before an answer")
        self.lead = "" if self.header else pieces[0][len(prompt) :]  # text before an answer
        self.end = end_of_turn(pieces[1], pieces[2], tokenizer)

    def _error(self, why: str) -> ValueError:
        return ValueError(
            f"the chat template rewrites earlier turns or leaves some out ({why}), so the "
            "assistant's tokens cannot be found; set chat_template to a file with {% generation %} "
            "markers around them"
        )

    def spans(self, messages: list[dict], tools: list | None = None) -> tuple[str, list[Span]]:
        """Return the rendered conversation and each answer's characters with its end of turn.

        Raises ValueError if the answers cannot be found in exactly one way.
        """
        full = render(messages, self.tokenizer, tools=tools)
        placeholder = next(chr(code) for code in PLACEHOLDERS if chr(code) not in full)
        replaced = [
            {"role": "assistant", "content": placeholder} if m["role"] == "assistant" else m
            for m in messages
        ]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        pieces = render(replaced, self.tokenizer, tools=tools).split(placeholder)
        if len(pieces) != len(answers) + 1:
            raise self._error("an answer is left out or repeated")
        for prompts in ((self.prompt, self.header), (self.header,)):
            found = self._match(full, pieces, answers, prompts)
            if found is not None:
                return full, found
        raise self._error("with other answers it renders another conversation")

    def _match(
        self, full: str, pieces: list[str], answers: list[str], prompts: Iterable[str]
    ) -> list[Span] | None:
        """Return the spans of the answers in `full`, or None if they do not fit in one way."""
        starts = [self._answer_start(piece, prompts) for piece in pieces[:-1]]
        if None in starts:
            return None
        fixed = [piece[:start] for piece, start in zip(pieces, [*starts, None], strict=True)]
        leads = [piece[start:] for piece, start in zip(pieces, starts, strict=False)]
        for clean in (str, str.strip):  # most templates render a message in one of these ways
            texts = [lead + clean(a) for lead, a in zip(leads, answers, strict=True)]
            whole = "".join(f + t for f, t in zip(fixed, [*texts, ""], strict=True))
            if whole == full:
                return self._with_ends(fixed, list(map(len, texts)))
        lengths = unique_gaps(full, fixed)
        return None if lengths is None else self._with_ends(fixed, lengths)

    def _answer_start(self, piece: str, prompts: Iterable[str]) -> int | None:
        """Return where the assistant's part of the text before an answer begins."""
        if not self.header:
            return len(piece) - len(self.lead) if piece.endswith(self.lead) else None
        header = piece.rfind(self.header)
        if header < 0:
            return None
        return header + next(len(p) for p in prompts if piece.startswith(p, header))

    def _with_ends(self, fixed: list[str], lengths: list[int]) -> list[Span]:
        """Return the spans of answers of these lengths between `fixed`, with their ends of turn."""
        spans, position = [], 0
        for text, length, behind in zip(fixed, lengths, fixed[1:], strict=False):
            position += len(text)
            end = len(self.end) if behind.startswith(self.end) else 0
            spans.append((position, position + length + end))
            position += length
        return spans


def unique_gaps(full: str, fixed: list[str]) -> list[int] | None:
    """Return the lengths of the gaps between the `fixed` texts in `full`; None if ambiguous."""
    if not (full.startswith(fixed[0]) and full.endswith(fixed[-1])):
        return None
    first, last = len(fixed[0]), len(full) - len(fixed[-1])
    from_left, at = [], first
    for text in fixed[1:-1]:
        found = full.find(text, at, last)
        if found < 0:
            return None
        from_left.append(found)
        at = found + len(text)
    from_right, at = [], last
    for text in reversed(fixed[1:-1]):
        at = full.rfind(text, first, at)
        from_right.append(at)
    if from_left != from_right[::-1]:
        return None
    begins = [first, *(at + len(text) for at, text in zip(from_left, fixed[1:-1], strict=True))]
    lengths = [end - begin for begin, end in zip(begins, [*from_left, last], strict=True)]
    return lengths if min(lengths) >= 0 else None


def end_of_turn(between: str, behind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that ends an answer.

    It reaches to the first special token after the answer; without one it is the text that follows
    every answer, which may be empty.
    """
    special = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len)[::-1]
    token = re.match(rf"\s*(?:{'|'.join(map(re.escape, special))})", behind) if special else None
    return token[0] if token else behind[: common_prefix(between, behind)].rstrip()


def common_prefix(a: str, b: str) -> int:
    """Return the length of the common prefix in characters."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def spans_by_markers(
    messages: list[dict], tools: list | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """Render a conversation and find the assistant's turns by the template's generation markers."""
    with limit_rendering(tokenizer.name_or_path):
        (text,), (spans,) = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=tokenizer.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return text, [(start, end) for start, end in spans]
