"""Encode rows as token ids and a target mask.

In a chat row the targets are the assistant turns, each with its end-of-turn token. In a text row
every token is a target, including the end-of-sequence token that is appended. The first token of
a row is never a target, because nothing precedes it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from kd.data.control_tokens import ControlTokens
from kd.data.files import BadRow
from kd.data.template import Span, SpanFinder, span_finder

IGNORE_INDEX = -100  # the label that PyTorch's cross-entropy ignores
ENCODE_BATCH = 256  # rows per tokenizer call
NO_TARGET = "without a target"
TOO_LONG = "longer than max_length"


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """Token ids and target mask of one document, from the encoder and the row cache to the batch.

    The arrays may be read-only views of the row cache. `cut` and `targets_cut` are set by `Encoder`
    and are not stored.
    """

    input_ids: np.ndarray  # (T,) int32
    target_mask: np.ndarray  # (T,) bool
    cut: bool = field(default=False, kw_only=True)  # the row was longer than max_length
    targets_cut: bool = field(default=False, kw_only=True)  # cutting it removed targets

    def __post_init__(self) -> None:
        assert self.target_mask.dtype == np.bool_ and len(self.input_ids) == len(self.target_mask)

    @classmethod
    def from_labels(cls, input_ids: Sequence[int], labels: Sequence[int]) -> "EncodedRow":
        """Return the row of (T,) ids and (T,) labels; labels are IGNORE_INDEX except at targets."""
        return cls(np.array(input_ids, np.int32), np.array(labels) != IGNORE_INDEX)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodedRow):
            return NotImplemented
        ours, theirs = self.arrays, other.arrays
        return ours.keys() == theirs.keys() and all(
            np.array_equal(array, theirs[name]) for name, array in ours.items()
        )

    @property
    def labels(self) -> np.ndarray:
        """(T,) int64: input_ids at targets, IGNORE_INDEX elsewhere. Labels are not shifted."""
        return np.where(self.target_mask, self.input_ids, np.int64(IGNORE_INDEX))

    @property
    def targets(self) -> int:
        """The number of target tokens."""
        return int(self.target_mask.sum())

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that the row cache stores, by file name."""
        return {"ids": self.input_ids, "mask": self.target_mask}

    def count_alignment(self, report: "EncodingReport") -> None:
        """Add to the alignment counts of `report`; a row with one tokenizer has none."""


@dataclass
class EncodingReport:
    """Counts of rows and tokens of an encoding; printed before training."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # rows by reason
    cut: int = 0  # kept rows that were longer than max_length
    targets_cut: int = 0  # of these, rows that lost targets
    tokens: int = 0
    targets: int = 0
    suspicious: dict[str, list] = field(default_factory=dict)  # see kd.data.row_checks
    # Only with a teacher that has another tokenizer:
    teacher_tokens: int = 0
    aligned: int = 0  # target tokens in a segment that both tokenizations share
    one_to_one: int = 0  # target tokens that equal one teacher token

    def drop(self, reasons: Iterable[str]) -> None:
        """Count one dropped row per reason."""
        self.dropped = dict(Counter(self.dropped) + Counter(reasons))

    def __str__(self) -> str:
        counts = {NO_TARGET: 0} | self.dropped
        dropped = ", ".join(f"{counts[reason]} dropped ({reason})" for reason in sorted(counts))
        lost = f" ({self.targets_cut} of them lost targets)" if self.targets_cut else ""
        return (
            f"rows: {self.read} read, {self.kept} kept, {dropped}, {self.cut} cut at max_length"
            f"{lost}; {self.tokens} tokens, {self.targets} targets"
        ) + "".join(f"\n{line}" for line in [*self.suspicions, *self.alignment])

    @property
    def suspicions(self) -> list[str]:
        """The printed lines about rows that are often mistakes, one a reason."""
        return [
            f"suspicious: {count} row{'s' * (count > 1)} {reason}, the first is {place}"
            for reason, (count, place) in self.suspicious.items()
        ]

    @property
    def alignment(self) -> list[str]:
        """The printed line about a teacher with another tokenizer; none without one."""
        if not self.teacher_tokens:
            return []
        one, aligned = (x / max(self.targets, 1) for x in (self.one_to_one, self.aligned))
        return [
            f"alignment: {one:.1%} of the targets equal one teacher token; {aligned:.1%} are "
            f"compared with the teacher; {self.teacher_tokens} teacher tokens"
        ]


class UncutRow(NamedTuple):
    """A row at its full length, before it is cut to max_length."""

    ids: np.ndarray  # (T,) int32
    spans: list[Span]  # the target tokens, as half-open ranges

    @property
    def target_mask(self) -> np.ndarray:
        """(T,) bool: True at the tokens of the spans."""
        mask = np.zeros(len(self.ids), bool)
        for first, end in self.spans:
            mask[first:end] = True
        return mask


def encode_rows(
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_long_row: str = "cut",
    control_tokens: str = "split",
) -> tuple[list[EncodedRow], EncodingReport]:
    """Encode rows of `kd.data.sources`; rows without a target are dropped and counted.

    Raises ValueError if no row is left, or if there are chat rows and no usable chat template.
    """
    results = encode_each(rows, tokenizer, max_length, on_long_row, control_tokens)
    report = EncodingReport()
    encoded = count_rows(results, report)
    require_rows(report)
    return encoded, report


def encode_each(
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_long_row: str = "cut",
    control_tokens: str = "split",
) -> list[EncodedRow | BadRow]:
    """Encode each row of `kd.data.sources`; a row without a target is a BadRow.

    Raises BadRow if the chat template rejects a row.
    """
    encoder = Encoder(tokenizer, max_length, on_long_row, control_tokens=control_tokens)
    results: list[EncodedRow | BadRow] = []
    placed = [(f"row {i}", row) for i, row in enumerate(rows)]
    for start in range(0, len(rows), ENCODE_BATCH):
        results += encoder(placed[start : start + ENCODE_BATCH])
    return results


def require_rows(report: EncodingReport) -> None:
    """Raise ValueError if no row was kept."""
    if not report.kept:
        counts = str(report).splitlines()[0]
        raise ValueError(f"no row with a target token is left ({counts})")


def count_rows(results: list[EncodedRow | BadRow], report: EncodingReport) -> list[EncodedRow]:
    """Count `results` in the report and return the rows among them."""
    kept = [row for row in results if isinstance(row, EncodedRow)]
    report.read += len(results)
    report.kept += len(kept)
    report.drop(row.kind for row in results if isinstance(row, BadRow))
    report.cut += sum(row.cut for row in kept)
    report.targets_cut += sum(row.targets_cut for row in kept)
    report.tokens += sum(len(row) for row in kept)
    report.targets += sum(row.targets for row in kept)
    for row in kept:
        row.count_alignment(report)
    return kept


class Encoder:
    """Encodes batches of rows: one tokenizer call for all texts, one for all chats.

    `on_long_row`: `cut` keeps the first max_length tokens, `cut_left` the last ones, and `drop`
    drops the row. `on_bad_row`: `error` raises BadRow for a row that the chat template rejects,
    `drop` returns it. `control_tokens`: `split` encodes control tokens in the text of a row as
    ordinary text, `keep` as control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        on_long_row: str = "cut",
        on_bad_row: str = "error",
        control_tokens: str = "split",
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.on_long_row, self.on_bad_row = on_long_row, on_bad_row
        self.control_tokens = ControlTokens(tokenizer, control_tokens)
        self.find_spans: SpanFinder | None = None  # made on first use: texts need no chat template

    def __call__(self, rows: Sequence[tuple[str, dict]]) -> list[EncodedRow | BadRow]:
        """Encode (place, row) pairs; the results are in the same order.

        Raises BadRow if the chat template rejects a row and on_bad_row is `error`.
        """
        uncut = zip(self.encode_uncut(rows), rows, strict=True)
        return [
            row if isinstance(row, BadRow) else self.cut(row, place) for row, (place, _) in uncut
        ]

    def encode_uncut(self, rows: Sequence[tuple[str, dict]]) -> list[UncutRow | BadRow]:
        """Encode (place, row) pairs at their full length. Raises BadRow as `__call__` does."""
        texts = [i for i, (_, row) in enumerate(rows) if "text" in row]
        chats = [i for i, (_, row) in enumerate(rows) if "text" not in row]
        results: list[UncutRow | BadRow] = [None] * len(rows)  # type: ignore[list-item]
        for i, text in zip(texts, self._texts([rows[i][1] for i in texts]), strict=True):
            results[i] = text
        for i, chat in zip(chats, self._chats([rows[i] for i in chats]), strict=True):
            results[i] = chat
        return results

    def _texts(self, rows: list[dict]) -> Iterator[UncutRow]:
        """Encode text rows; every token is a target."""
        if not rows:
            return
        eos, texts = self.tokenizer.eos_token_id, [row["text"] for row in rows]
        batch = self.tokenizer(texts, verbose=False)["input_ids"]
        for text, ids in zip(texts, batch, strict=True):
            if self.control_tokens.found_in(text):
                ids = self.control_tokens.encode_text(text).ids
            # eos may also be the padding id: masks, not ids, tell targets from padding.
            ids = np.array(ids if ids and ids[-1] == eos else [*ids, eos], np.int32)
            yield UncutRow(ids, [(0, len(ids))])

    def _chats(self, rows: list[tuple[str, dict]]) -> Iterator[UncutRow | BadRow]:
        """Encode chat rows; the tokens of the assistant turns are targets."""
        if not rows:
            return
        rendered = [self._render(place, row) for place, row in rows]
        done = UncutRow | BadRow
        texts = [result[0] for result in rendered if not isinstance(result, done)]
        out = iter(())
        if texts:
            # The template has written the special tokens already.
            batch = self.tokenizer(texts, add_special_tokens=False, verbose=False)
            out = enumerate(batch["input_ids"])
        for result in rendered:
            if isinstance(result, done):
                yield result
                continue
            i, ids = next(out)
            yield UncutRow(np.array(ids, np.int32), token_spans(batch, i, result[1], len(ids)))

    def _render(self, place: str, row: dict) -> tuple[str, list[Span]] | UncutRow | BadRow:
        """Return the rendered conversation and the character spans of its assistant turns.

        A row with control tokens in its text is encoded at once.
        """
        if self.find_spans is None:
            self.find_spans = span_finder(self.tokenizer)
        typed = self.control_tokens.found_in(row)
        tokens = self.control_tokens.clear_of(row) if typed else None
        shown = tokens.guarded(row) if tokens else row
        try:
            text, spans = self.find_spans(shown["messages"], shown.get("tools"))
            check_prompts_rendered(shown["messages"], text)
            return encode_guarded(tokens, row, text, spans) if tokens else (text, spans)
        except (TemplateError, ValueError, TypeError) as error:
            message = f"the chat template rejects this row: {error}"
            bad = BadRow(place, "refused by the chat template", message)
            if self.on_bad_row == "error":
                raise bad from error
            return bad

    @property
    def kept_tokens(self) -> slice:
        """The tokens of an uncut row that cutting keeps."""
        left = self.on_long_row == "cut_left"
        return slice(-self.max_length, None) if left else slice(self.max_length)

    def cut(self, row: UncutRow, place: str) -> EncodedRow | BadRow:
        """Cut a row to max_length. Returns BadRow if it is too long or has no target left."""
        too_long = len(row.ids) > self.max_length
        if too_long and self.on_long_row == "drop":
            message = f"{len(row.ids)} tokens; wanted at most {self.max_length} (max_length)"
            return BadRow(place, TOO_LONG, message)
        whole_mask = row.target_mask
        mask = whole_mask[self.kept_tokens].copy()
        mask[:1] = False
        if not mask.any():
            return BadRow(place, NO_TARGET, "no target token")
        lost = bool(whole_mask[1:].sum() > mask.sum())
        return EncodedRow(row.ids[self.kept_tokens], mask, cut=too_long, targets_cut=lost)


def encode_guarded(tokens: ControlTokens, row: dict, text: str, spans: list[Span]) -> UncutRow:
    """Encode the rendering of a guarded row, as `kd.data.control_tokens` explains."""
    tokens.check_rendered(text, row["messages"], tools=row.get("tools"))
    text, spans = tokens.named(text, spans)
    batch = tokens.encode_named([text])
    ids = batch["input_ids"][0]
    return UncutRow(np.array(ids, np.int32), token_spans(batch, 0, spans, len(ids)))


def check_prompts_rendered(messages: list[dict], text: str) -> None:
    """Raise ValueError if the rendered text lacks a system or user message.

    Some Mistral templates omit the system prompt if the last message is an answer.
    """
    for message in messages:
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise ValueError(f"it leaves out or changes the {message['role']} message")


def token_spans(batch: BatchEncoding, row: int, spans: list[Span], length: int) -> list[Span]:
    """Convert character spans of a row to token spans; a span without a token becomes (0, 0)."""
    found = []
    for left, right in spans:
        tokens = (batch.char_to_token(row, at) for at in range(left, right))
        first = next((token for token in tokens if token is not None), None)
        if first is None:  # an empty span, or the tokenizer drops its characters
            found.append((0, 0))
            continue
        tokens = (batch.char_to_token(row, at) for at in range(right - 1, left - 1, -1))
        last = next(token for token in tokens if token is not None)
        while last + 1 < length and _begins_before(batch, row, last + 1, right):
            last += 1  # one character may be split into several tokens
        found.append((first, last + 1))
    return found


def _begins_before(batch: BatchEncoding, row: int, token: int, right: int) -> bool:
    span = batch.token_to_chars(row, token)
    return span is not None and span.start < right and span.end > span.start
