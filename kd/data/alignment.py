"""Align each row with its tokens under a teacher's tokenizer, by bytes.

Each model reads the conversation in its own chat template. A segment is a run of student tokens
and a run of teacher tokens that stand for the same bytes of a target span, as short as possible.
They are found from the bytes of the vocabularies' tokens, because a token may end inside a
character. Text that the templates write differently (blanks around an answer, an empty thought) or
that one tokenizer normalizes is in no segment; the student learns it from the data alone. The
end-of-turn token is a segment of its own, whatever each template writes there.

T tokens of a row, S segments.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kd.data.encoding import EncodedRow, Encoder, EncodingReport, UncutRow
from kd.data.files import BadRow
from kd.data.packing import Collator
from kd.data.tokenizer import special_ids
from kd.data.vocabularies import SharedVocabulary

# Tokens of a segment on either side. In a longer one single tokens say little about each other.
MAX_SEGMENT_TOKENS = 32
FROM_END = 2**40  # added to positions that are counted from the end of a span
NO_SEGMENT = -1


@dataclass(frozen=True, eq=False)
class AlignedRow(EncodedRow):
    """A row and the tokens that the teacher reads for it, up to the last token in a segment."""

    segments: np.ndarray = field(repr=False)  # (T,) each token's segment, or NO_SEGMENT
    teacher_ids: np.ndarray = field(repr=False)  # (T of the teacher,)
    teacher_segments: np.ndarray = field(repr=False)  # (T of the teacher,)
    # Student tokens in a segment of one token each with the same bytes. Set by AlignedEncoder only.
    one_to_one: int = field(default=0, kw_only=True)

    @property
    def teacher(self) -> EncodedRow:
        """The teacher's row; its targets are the tokens in segments."""
        return EncodedRow(self.teacher_ids, self.teacher_segments >= 0)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that the row cache stores, by file name; segments are called chunks there."""
        return super().arrays | {
            "chunks": self.segments,
            "teacher_ids": self.teacher_ids,
            "teacher_chunks": self.teacher_segments,
        }

    def count_alignment(self, report: EncodingReport) -> None:
        """Add this row to the alignment counts of `report`."""
        report.teacher_tokens += len(self.teacher_ids)
        report.aligned += int((self.segments >= 0).sum())
        report.one_to_one += self.one_to_one


@dataclass(frozen=True)
class SpanText:
    """A target span as the bytes of its tokens; `ends` if a special token follows them."""

    pieces: list[bytes]
    ends: bool


class AlignedEncoder:
    """Encodes batches of rows for student and teacher, as `kd.data.encoding.Encoder` does for one.

    `pieces` and `special` hold the bytes of every id and the special ids, student's first.
    """

    def __init__(self, student: Encoder, teacher: Encoder, vocabulary: SharedVocabulary) -> None:
        self.student, self.teacher, self.twin = student, teacher, vocabulary.twin
        self.pieces = vocabulary.student.pieces, vocabulary.teacher.pieces
        self.special = [special_ids(encoder.tokenizer) for encoder in (student, teacher)]
        self.bos = [encoder.tokenizer.bos_token_id for encoder in (student, teacher)]

    def __call__(self, rows: list[tuple[str, dict]]) -> list[AlignedRow | BadRow]:
        """Encode (place, row) pairs; a row that either template rejects is a BadRow.

        Raises BadRow as `Encoder.__call__` does.
        """
        uncut = (encoder.encode_uncut(rows) for encoder in (self.student, self.teacher))
        results = []
        for ours, theirs, (place, _) in zip(*uncut, rows, strict=True):
            bad = next((row for row in (ours, theirs) if isinstance(row, BadRow)), None)
            results.append(bad or self.align(ours, theirs, place))
        return results

    def align(self, ours: UncutRow, theirs: UncutRow, place: str) -> AlignedRow | BadRow:
        """Cut both sides to max_length and number the segments that are whole on both.

        Returns BadRow as `Encoder.cut` does.
        """
        row = self.student.cut(ours, place)
        if isinstance(row, BadRow):
            return row
        segments = self.segments(ours, theirs)  # (S, 2, 2)
        sizes = segments[:, :, 1] - segments[:, :, 0]  # (S, 2)
        whole = (sizes <= MAX_SEGMENT_TOKENS).all(1)  # (S,)
        kept = []  # each side's segment of every token that is left after the cut
        for side, (uncut, encoder) in enumerate(
            zip((ours, theirs), (self.student, self.teacher), strict=True)
        ):
            numbers = segment_of_tokens(len(uncut.ids), segments[:, side])
            kept.append(numbers[encoder.kept_tokens])
            # The first token of a row is never a target.
            predicted = kept[side][1:][kept[side][1:] >= 0]
            whole &= np.bincount(predicted, minlength=len(segments)) == sizes[:, side]
        renumbered = np.append(np.where(whole, np.cumsum(whole) - 1, NO_SEGMENT), NO_SEGMENT)
        of_student, of_teacher = (renumbered[numbers].astype(np.int32) for numbers in kept)
        end = int(np.flatnonzero(of_teacher >= 0)[-1]) + 1 if whole.any() else 1
        starts = segments[whole & (sizes == 1).all(1), :, 0]  # (segments of one token each, 2)
        equal = self.twin[ours.ids[starts[:, 0]]] == theirs.ids[starts[:, 1]]
        return AlignedRow(
            row.input_ids,
            row.target_mask,
            of_student,
            theirs.ids[self.teacher.kept_tokens][:end],
            of_teacher[:end],
            cut=row.cut,
            targets_cut=row.targets_cut,
            one_to_one=int(equal.sum()),
        )

    def segments(self, ours: UncutRow, theirs: UncutRow) -> np.ndarray:
        """Return (S, 2, 2): each segment's first token and end, for student and teacher.

        There is no segment if the templates render different numbers of target spans.
        """
        found = [np.zeros((0, 2, 2), np.int64)]
        if len(ours.spans) == len(theirs.spans):
            for spans in zip(ours.spans, theirs.spans, strict=True):
                first, text = self._span_text(0, ours.ids, spans[0])
                other_first, other_text = self._span_text(1, theirs.ids, spans[1])
                offsets = np.array([[first], [other_first]])
                found.append(span_segments(text, other_text) + offsets)
        return np.concatenate(found)

    def _span_text(self, side: int, ids: np.ndarray, span: tuple[int, int]) -> tuple[int, SpanText]:
        """Return the first token of a span and its text."""
        first, end = span
        if first < end and ids[first] == self.bos[side]:
            first += 1  # some tokenizers prepend a beginning-of-sequence token to a text
        ends = first < end and int(ids[end - 1]) in self.special[side]
        pieces = self.pieces[side]
        return first, SpanText([pieces[i] for i in ids[first : end - ends].tolist()], ends)


def span_segments(ours: SpanText, theirs: SpanText) -> np.ndarray:
    """Return (S, 2, 2) as `AlignedEncoder.segments`, counted from the first tokens of the spans."""
    positions = boundary_positions(ours, theirs)
    common, *indices = np.intersect1d(*positions, return_indices=True)
    # The text between a position from the beginning and one from the end is not the same on both
    # sides.
    same_origin = (common[1:] < FROM_END // 2) == (common[:-1] < FROM_END // 2)
    return np.stack([np.stack([i[:-1], i[1:]], -1) for i in indices], 1)[same_origin]


def boundary_positions(ours: SpanText, theirs: SpanText) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of every token boundary of both texts; equal positions correspond.

    Texts that differ correspond in their common prefix and suffix, apart from blanks at their
    ends. A boundary elsewhere gets a position that the other text does not have.
    """
    texts = [b"".join(text.pieces) for text in (ours, theirs)]
    lead, trail = [0, 0], [0, 0]
    if texts[0] != texts[1]:
        lead, trail = differing_blanks(*texts)
    cores = [text[lead[i] : len(text) - trail[i]] for i, text in enumerate(texts)]
    same = cores[0] == cores[1]
    prefix = 0 if same else common_prefix_length(*cores)
    shortest = min(map(len, cores))
    suffix = shortest if same else common_prefix_length(*(core[::-1] for core in cores))
    suffix = min(suffix, shortest - prefix)
    found = []
    for i, text in enumerate((ours, theirs)):
        ends = np.cumsum([len(piece) for piece in text.pieces], dtype=np.int64) - lead[i]
        size = len(cores[i])
        unique = -2 - i - 2 * np.arange(len(ends))  # even for one text, odd for the other
        positions = np.where((ends > 0) & (ends <= prefix), ends, unique)
        in_suffix = (ends >= max(size - suffix, 1)) & (ends <= size)
        positions = np.where(in_suffix, FROM_END + ends - size, positions)
        start = FROM_END - size if same else 0
        positions = np.concatenate([[start], positions, [FROM_END + 1] if text.ends else []])
        found.append(positions.astype(np.int64))
    return found[0], found[1]


def differing_blanks(a: bytes, b: bytes) -> tuple[list[int], list[int]]:
    """Return the lengths of both texts' leading and trailing blanks; 0 where they are the same."""
    front = [text[: len(text) - len(text.lstrip())] for text in (a, b)]
    back = [text[len(text.rstrip()) :] if text.strip() else b"" for text in (a, b)]
    lead = [0, 0] if front[0] == front[1] else [len(x) for x in front]
    trail = [0, 0] if back[0] == back[1] else [len(x) for x in back]
    return lead, trail


def common_prefix_length(a: bytes, b: bytes) -> int:
    """Return the length of the common prefix in bytes."""
    n = min(len(a), len(b))
    different = np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)
    return int(different.argmax()) if different.any() else n


def segment_of_tokens(length: int, segments: np.ndarray) -> np.ndarray:
    """Return (length,): each token's segment among (S, 2) token ranges, or NO_SEGMENT."""
    found = np.full(length, NO_SEGMENT)
    if len(segments):
        tokens = np.arange(length)
        number = np.searchsorted(segments[:, 1], tokens, side="right").clip(max=len(segments) - 1)
        inside = (segments[number, 0] <= tokens) & (tokens < segments[number, 1])
        found[inside] = number[inside]
    return found


class AlignedCollator:
    """Adds the teacher's tokens to a collator's batch, and the segment of each target.

    `segments` (N,) and `teacher_segments` (M,) are numbered over the batch in the order of its
    targets. They stay on the host, where the loss lays out its tiles. Documents that share a row
    on the student's side share one on the teacher's.
    """

    def __init__(self, collator: Collator, teacher_pad_token_id: int) -> None:
        self.collator, self.flat = collator, collator.flat
        self.teacher = Collator(teacher_pad_token_id, collator.multiple, collator.flat)

    def __call__(self, rows: list[list[EncodedRow]]) -> dict:
        """Collate rows into (B, T) tensors for both models, each with its own T, and segments."""
        batch = self.collator(rows)
        rows = [[self._with_teacher(document) for document in documents] for documents in rows]
        theirs = self.teacher([[document.teacher for document in row] for row in rows])
        documents = [document for row in rows for document in row]
        counts = [int(document.segments.max(initial=NO_SEGMENT)) + 1 for document in documents]
        offsets = np.cumsum([0, *counts])[:-1]
        return batch | {
            **{f"teacher_{name}": value for name, value in theirs.items() if name != "tokens"},
            "segments": _target_segments(
                (document.segments[document.target_mask] for document in documents), offsets
            ),
            "teacher_segments": _target_segments(
                (
                    document.teacher_segments[document.teacher_segments >= 0]
                    for document in documents
                ),
                offsets,
            ),
        }

    def _with_teacher(self, row: EncodedRow) -> AlignedRow:
        """Give a row that only fills up a batch one padding token for the teacher."""
        if isinstance(row, AlignedRow):
            return row
        none = np.full(len(row), NO_SEGMENT, np.int32)
        padding = np.array([self.teacher.pad_token_id], np.int32)
        return AlignedRow(row.input_ids, row.target_mask, none, padding, none[:1])


def _target_segments(segments: Iterable[np.ndarray], offsets: np.ndarray) -> np.ndarray:
    """Join each document's segments of its targets, numbered from the document's offset."""
    found = [np.zeros(0, np.int64)]
    for numbers, offset in zip(segments, offsets, strict=True):
        found.append(np.where(numbers >= 0, numbers + offset, NO_SEGMENT))
    return np.concatenate(found)
