"""Which characters of a rendered conversation are the assistant's.

A template with generation markers says so itself. Of any other the conversation is rendered twice,
the second time with a mark in place of every assistant message: what stands around the marks is the
template's and the other roles', and what the first rendering has in their places is the assistant's.
Every character of the first rendering must be accounted for in exactly one way.
"""

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKS = range(0xE000, 0xF8FF)  # code points of private use, which texts hardly have
Span = tuple[int, int]  # first character, and the one behind the last
Find = Callable[[list[dict], list | None], tuple[str, list[Span]]]


def render(messages: list[dict], tokenizer: PreTrainedTokenizerBase, **kwargs) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def with_arguments(template: str, arguments: dict) -> str:
    """The template with defaults for its variables in front: whoever reads it later has them, too."""
    lines = []
    for name, value in arguments.items():
        if not name.isidentifier():
            raise ValueError(f"template_arguments: {name!r} is no name of a variable")
        lines.append(f"{{%- set {name} = {name} if {name} is defined else {literal(value)} %}}\n")
    return "".join(lines) + template  # Jinja's trim_blocks takes the newlines away


def literal(value: object) -> str:
    """A JSON value as Jinja spells it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def writes_the_date(template: str) -> bool:
    """Llama 3.1 and later put today's date into the system prompt: other rows every day."""
    return "strftime_now" in template and "set date_string = date_string if" not in template


def span_finder(tokenizer: PreTrainedTokenizerBase) -> Find:
    """(messages, tools) -> (the rendered conversation, the characters of the assistant's turns).

    Raises ValueError where the tokenizer has no template, or one that rewrites earlier turns.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: no chat template, and the data has chat rows; give "
            "chat_template: a file with one"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{tokenizer.name_or_path}: a tokenizer without tokenizer.json does not tell which "
            "characters a token stands for; convert it (save_pretrained of a fast tokenizer)"
        )
    if GENERATION.search(tokenizer.get_chat_template()):
        return lambda messages, tools: marked_spans(messages, tools, tokenizer)
    return AssistantTurns(tokenizer).spans


class AssistantTurns:
    """Finds the assistant's turns in renderings of one tokenizer's template without markers.

    Raises ValueError where the template does not write turns side by side.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        mark, user = chr(MARKS[0]), {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": mark}
        prompt = render([user], tokenizer, add_generation_prompt=True)
        pieces = render([user, answer, user, answer], tokenizer).split(mark)
        if len(pieces) != 3:
            raise self.refused("it does not write every answer once")
        # The generation prompt, and how much of it stands before an earlier answer, too: Qwen3
        # without thinking puts an empty thought into the prompt, and into the last turn alone.
        begin = common_prefix(prompt, render([user], tokenizer))
        self.prompt = prompt[begin:]
        self.header = prompt[begin : common_prefix(prompt, pieces[0])]
        if not self.header and not pieces[0].startswith(prompt):
            raise self.refused("its generation prompt is not what stands before an answer")
        self.lead = "" if self.header else pieces[0][len(prompt) :]
        self.end = end_of_turn(pieces[1], pieces[2], tokenizer)

    def refused(self, why: str) -> ValueError:
        return ValueError(
            f"the chat template rewrites earlier turns, or leaves some out ({why}), so assistant "
            "tokens cannot be told apart; give chat_template: a file with {% generation %} markers "
            "around them"
        )

    def spans(self, messages: list[dict], tools: list | None = None) -> tuple[str, list[Span]]:
        """(the rendered conversation, the characters of each answer with its end of turn)."""
        full = render(messages, self.tokenizer, tools=tools)
        mark = next(chr(code) for code in MARKS if chr(code) not in full)
        marked = [
            {"role": "assistant", "content": mark} if message["role"] == "assistant" else message
            for message in messages
        ]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        pieces = render(marked, self.tokenizer, tools=tools).split(mark)
        if len(pieces) != len(answers) + 1:
            raise self.refused("an answer is left out or repeated")
        for prompts in ((self.prompt, self.header), (self.header,)):
            found = self.match(full, pieces, answers, prompts)
            if found is not None:
                return full, found
        raise self.refused("without the answers it writes another conversation")

    def match(
        self, full: str, pieces: list[str], answers: list[str], prompts: Iterable[str]
    ) -> list[Span] | None:
        """The answers' places in `full`, None where they are not there in exactly one way."""
        starts = [self.answer_start(piece, prompts) for piece in pieces[:-1]]
        if None in starts:
            return None
        fixed = [piece[:start] for piece, start in zip(pieces, [*starts, None], strict=True)]
        leads = [piece[start:] for piece, start in zip(pieces, starts, strict=False)]
        for clean in (str, str.strip):  # as most templates write a message
            texts = [lead + clean(a) for lead, a in zip(leads, answers, strict=True)]
            whole = "".join(f + t for f, t in zip(fixed, [*texts, ""], strict=True))
            if whole == full:
                return self.with_ends(fixed, list(map(len, texts)))
        lengths = unique_gaps(full, fixed)
        return None if lengths is None else self.with_ends(fixed, lengths)

    def answer_start(self, piece: str, prompts: Iterable[str]) -> int | None:
        """Where in the text before an answer the assistant's own part begins."""
        if not self.header:
            return len(piece) - len(self.lead) if piece.endswith(self.lead) else None
        header = piece.rfind(self.header)
        if header < 0:
            return None
        return header + next(len(p) for p in prompts if piece.startswith(p, header))

    def with_ends(self, fixed: list[str], lengths: list[int]) -> list[Span]:
        spans, position = [], 0
        for text, length, behind in zip(fixed, lengths, fixed[1:], strict=False):
            position += len(text)
            end = len(self.end) if behind.startswith(self.end) else 0
            spans.append((position, position + length + end))
            position += length
        return spans


def unique_gaps(full: str, fixed: list[str]) -> list[int] | None:
    """Lengths of what stands between the `fixed` texts in `full`; None unless there is one way."""
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
    """What ends an answer: up to the first special token behind it, or else what always stands
    there. "" where a template writes nothing of its own."""
    special = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len)[::-1]
    token = re.match(rf"\s*(?:{'|'.join(map(re.escape, special))})", behind) if special else None
    return token[0] if token else behind[: common_prefix(between, behind)].rstrip()


def common_prefix(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def marked_spans(
    messages: list[dict], tools: list | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """As `span_finder`, by the template's own generation markers."""
    (text,), (spans,) = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text, [(start, end) for start, end in spans]
