"""Rows to token ids and a target mask: what the loss is taken on.

Chat: every assistant turn with its end-of-turn token, nothing else. Plain text: every token, and an
end-of-sequence token behind it. The first token of a row is never a target: nothing precedes it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedTokenizerBase

from kd.data.files import BadRow
from kd.data.template import Find, Span, span_finder

IGNORE_INDEX = -100  # the label that transformers and PyTorch leave out
CHUNK = 256  # rows that are tokenised in one call
NO_TARGET = "without a target"
TOO_LONG = "longer than max_length"


Whole = tuple[np.ndarray, list[Span]]  # ids (T,) of a row, and which tokens are its targets


@dataclass(frozen=True)
class EncodedRow:
    input_ids: list[int]
    labels: list[int]  # input_ids at targets, IGNORE_INDEX elsewhere; not shifted

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass
class EncodingReport:
    """What happened to the rows; printed before training."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # rows by reason
    cut: int = 0  # rows longer than max_length that were kept
    targets_cut: int = 0  # those that lost targets by it
    tokens: int = 0
    targets: int = 0
    teacher_tokens: int = 0  # these three where a teacher has another tokenizer
    aligned: int = 0  # targets in chunks of text that begin and end in both tokenisations
    one_to_one: int = 0  # those of them that are one token for both

    @property
    def without_target(self) -> int:
        return self.dropped.get(NO_TARGET, 0)

    def drop(self, kinds: Iterable[str]) -> None:
        self.dropped = dict(Counter(self.dropped) + Counter(kinds))

    def __str__(self) -> str:
        counts = {NO_TARGET: 0} | self.dropped
        dropped = ", ".join(f"{counts[reason]} dropped {reason}" for reason in sorted(counts))
        lost = f", {self.targets_cut} of them in a target" if self.targets_cut else ""
        return (
            f"rows: {self.read} read, {self.kept} kept, {dropped}, {self.cut} cut at max_length"
            f"{lost}; {self.tokens} tokens, {self.targets} targets"
        ) + (f"\n{self.alignment}" if self.teacher_tokens else "")

    @property
    def alignment(self) -> str:
        one, aligned = (x / max(self.targets, 1) for x in (self.one_to_one, self.aligned))
        return (
            f"alignment: {one:.1%} of the targets are one token for the teacher, too; {aligned:.1%} "
            f"are compared with it; {self.teacher_tokens} tokens for the teacher"
        )


@dataclass(frozen=True)
class CutRow:
    """Ids (T,) of a row and its mask (T,), True at targets, at most max_length long."""

    ids: np.ndarray
    mask: np.ndarray
    cut: bool
    targets_cut: bool

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is written of it, by file."""
        return {"ids": self.ids, "mask": self.mask}

    def count_alignment(self, report: EncodingReport) -> None:
        """Nothing, where a row has one tokenizer."""

    def encoded(self) -> EncodedRow:
        return EncodedRow(self.ids.tolist(), np.where(self.mask, self.ids, IGNORE_INDEX).tolist())


def encode_rows(
    rows: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    progress: bool = True,
    on_long_row: str = "cut",
) -> tuple[list[EncodedRow], EncodingReport]:
    """Encode rows of `kd.data.sources`; rows without any target are dropped and counted.

    Raises ValueError where no row is left, or a chat row meets a tokenizer without a template.
    """
    encoder, encoded, report = Encoder(tokenizer, max_length, on_long_row), [], EncodingReport()
    placed = [(f"row {i}", row) for i, row in enumerate(rows)]
    with tqdm(total=len(rows), desc="tokenising", unit="row", disable=not progress) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = placed[start : start + CHUNK]
            encoded += [row.encoded() for row in count_rows(encoder(chunk), report)]
            bar.update(len(chunk))
    require_rows(report)
    return encoded, report


def require_rows(report: EncodingReport) -> None:
    if not report.kept:
        raise ValueError(f"no row with a target token is left ({report})")


def count_rows(results: list["CutRow | BadRow"], report: EncodingReport) -> list["CutRow"]:
    """The rows that are kept, each accounted for in the report."""
    kept = [row for row in results if isinstance(row, CutRow)]
    report.read += len(results)
    report.kept += len(kept)
    report.drop(row.kind for row in results if isinstance(row, BadRow))
    report.cut += sum(row.cut for row in kept)
    report.targets_cut += sum(row.targets_cut for row in kept)
    report.tokens += sum(len(row.ids) for row in kept)
    report.targets += sum(int(row.mask.sum()) for row in kept)
    for row in kept:
        row.count_alignment(report)
    return kept


class Encoder:
    """Encodes chunks of rows with one tokenizer call for all texts and one for all chats.

    `on_long_row`: cut keeps the first max_length tokens, cut_left the last, drop none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        on_long_row: str = "cut",
        on_bad_row: str = "error",
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.on_long_row, self.on_bad_row = on_long_row, on_bad_row
        self.find: Find | None = None  # made for the first conversation: texts need no template

    def __call__(self, rows: Sequence[tuple[str, dict]]) -> list[CutRow | BadRow]:
        """A result for each (place, row)."""
        found = zip(self.encode(rows), rows, strict=True)
        return [
            whole if isinstance(whole, BadRow) else self.cut(whole[0], mask_of(*whole), place)
            for whole, (place, _) in found
        ]

    def encode(self, rows: Sequence[tuple[str, dict]]) -> list[Whole | BadRow]:
        """Each row at its full length. Raises BadRow where a template refuses a conversation,
        or returns it where bad rows are dropped."""
        texts = [i for i, (_, row) in enumerate(rows) if "text" in row]
        chats = [i for i, (_, row) in enumerate(rows) if "text" not in row]
        found: list[Whole | BadRow] = [None] * len(rows)  # type: ignore[list-item]
        for i, text in zip(texts, self.texts([rows[i][1] for i in texts]), strict=True):
            found[i] = text
        for i, chat in zip(chats, self.chats([rows[i] for i in chats]), strict=True):
            found[i] = chat
        return found

    def texts(self, rows: list[dict]):
        """Every text, all of whose tokens are targets."""
        if not rows:
            return
        eos = self.tokenizer.eos_token_id
        for ids in self.tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]:
            # Where pad is eos it is still a real token here: the mask, not the id, tells padding.
            ids = np.array(ids if ids and ids[-1] == eos else [*ids, eos], np.int32)
            yield ids, [(0, len(ids))]

    def chats(self, rows: list[tuple[str, dict]]):
        """Every conversation, whose assistant's tokens are targets, or why there is none."""
        if not rows:
            return
        rendered = [self.rendered(place, row) for place, row in rows]
        good = [found for found in rendered if not isinstance(found, BadRow)]
        out = iter(())
        if good:  # the template wrote the special tokens
            full = [text for text, _ in good]
            batch = self.tokenizer(full, add_special_tokens=False, verbose=False)
            out = enumerate(batch["input_ids"])
        for found in rendered:
            if isinstance(found, BadRow):
                yield found
                continue
            i, ids = next(out)
            yield np.array(ids, np.int32), token_spans(batch, i, found[1], len(ids))

    def rendered(self, place: str, row: dict) -> tuple[str, list[Span]] | BadRow:
        if self.find is None:
            self.find = span_finder(self.tokenizer)
        try:
            text, spans = self.find(row["messages"], row.get("tools"))
            check_nothing_left_out(row["messages"], text)
            return text, spans
        except (TemplateError, ValueError, TypeError) as error:
            found = f"the chat template refuses it: {error}"
            bad = BadRow(place, "refused by the chat template", found)
            if self.on_bad_row == "error":
                raise bad from error
            return bad

    @property
    def kept(self) -> slice:
        """The tokens of a row that are left of it."""
        left = self.on_long_row == "cut_left"
        return slice(-self.max_length, None) if left else slice(self.max_length)

    def cut(self, ids: np.ndarray, mask: np.ndarray, place: str) -> CutRow | BadRow:
        long = len(ids) > self.max_length
        if long and self.on_long_row == "drop":
            return BadRow(place, TOO_LONG, f"{len(ids)} tokens")
        left = mask[self.kept].copy()
        left[:1] = False
        if not left.any():
            return BadRow(place, NO_TARGET, "no target token")
        lost = bool(mask[1:].sum() > left.sum())
        return CutRow(ids[self.kept], left, long, lost)


def check_nothing_left_out(messages: list[dict], text: str) -> None:
    """Some of Mistral's templates forget the system prompt where an answer is the last message."""
    for message in messages:
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise ValueError(f"the {message['role']} message is left out or changed")


def mask_of(ids: np.ndarray, spans: list[Span]) -> np.ndarray:
    """True at the tokens of the spans, (T,)."""
    mask = np.zeros(len(ids), bool)
    for first, end in spans:
        mask[first:end] = True
    return mask


def token_spans(batch: BatchEncoding, row: int, spans: list[Span], length: int) -> list[Span]:
    """The tokens that hold a character of each span; (0, 0) where none does."""
    found = []
    for left, right in spans:
        tokens = (batch.char_to_token(row, at) for at in range(left, right))
        first = next((token for token in tokens if token is not None), None)
        if first is None:
            found.append((0, 0))  # empty, or nothing of it became a token
            continue
        tokens = (batch.char_to_token(row, at) for at in range(right - 1, left - 1, -1))
        last = next(token for token in tokens if token is not None)
        while last + 1 < length and shares_character(batch, row, last + 1, right):
            last += 1  # a character may be cut into several tokens
        found.append((first, last + 1))
    return found


def shares_character(batch: BatchEncoding, row: int, token: int, right: int) -> bool:
    span = batch.token_to_chars(row, token)
    return span is not None and span.start < right and span.end > span.start
