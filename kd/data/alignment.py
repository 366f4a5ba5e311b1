"""Rows for a teacher with another tokenizer: its own ids beside the student's, aligned by bytes.

Each model reads the conversation in its own template. Of every target span the bytes that its tokens
stand for are compared, token by token from the vocabulary: a token may end inside a character. Where
both tokenisations have a boundary at the same byte they meet, and between two meetings lies a chunk.
What the templates write differently (blanks around an answer, an empty thought in front of it) and
what a tokenizer normalises is in no chunk; the student learns such tokens from the text alone. The
end of a turn is a place of its own, whatever each template writes there.
T tokens of a row, C chunks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kd.data.encoding import (
    IGNORE_INDEX,
    CutRow,
    EncodedRow,
    Encoder,
    EncodingReport,
    Whole,
    mask_of,
)
from kd.data.files import BadRow
from kd.data.packing import Collator
from kd.data.tokenizer import special_ids
from kd.data.vocabularies import SharedVocabulary

MOST = 32  # tokens of a chunk on either side; texts so far apart say nothing of single tokens
FAR = 2**40  # byte positions that are counted from the end of a span
NO_CHUNK = -1


@dataclass(frozen=True)
class AlignedRow(EncodedRow):
    chunks: list[int] = field(repr=False)  # of every token: the number of its chunk, or NO_CHUNK
    teacher: EncodedRow = field(repr=False)  # its labels are the tokens of chunks
    teacher_chunks: list[int] = field(repr=False)


@dataclass(frozen=True)
class AlignedCut(CutRow):
    chunks: np.ndarray  # (T,)
    teacher_ids: np.ndarray  # (T of the teacher,) up to its last chunk
    teacher_chunks: np.ndarray  # (T of the teacher,)
    one_to_one: int  # student tokens whose chunk is one token of equal bytes for both

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return super().arrays | {
            "chunks": self.chunks,
            "teacher_ids": self.teacher_ids,
            "teacher_chunks": self.teacher_chunks,
        }

    def count_alignment(self, report: EncodingReport) -> None:
        report.teacher_tokens += len(self.teacher_ids)
        report.aligned += int((self.chunks >= 0).sum())
        report.one_to_one += self.one_to_one

    def encoded(self) -> "AlignedRow":
        row = super().encoded()
        return AlignedRow(
            row.input_ids,
            row.labels,
            self.chunks.tolist(),
            teacher_row(self.teacher_ids, self.teacher_chunks),
            self.teacher_chunks.tolist(),
        )


@dataclass(frozen=True)
class Text:
    """A target span: the bytes of its tokens, and whether one more, special, ends it."""

    pieces: list[bytes]
    ends: bool


class AlignedEncoder:
    """Encodes chunks of rows for both models, as `kd.data.encoding.Encoder` does for one."""

    def __init__(self, student: Encoder, teacher: Encoder, vocabulary: SharedVocabulary) -> None:
        self.student, self.teacher, self.twin = student, teacher, vocabulary.twin
        self.pieces = vocabulary.student.pieces, vocabulary.teacher.pieces
        self.special = [special_ids(encoder.tokenizer) for encoder in (student, teacher)]
        self.begins = [encoder.tokenizer.bos_token_id for encoder in (student, teacher)]

    def __call__(self, rows: list[tuple[str, dict]]) -> list[CutRow | BadRow]:
        """A result for each (place, row); a row that either template refuses is a bad one."""
        both = zip(self.student.encode(rows), self.teacher.encode(rows), rows, strict=True)
        return [
            next((x for x in (ours, theirs) if isinstance(x, BadRow)), None)
            or self.aligned(ours, theirs, place)
            for ours, theirs, (place, _) in both
        ]

    def aligned(self, ours: Whole, theirs: Whole, place: str) -> AlignedCut | BadRow:
        encoders = self.student, self.teacher
        cut = self.student.cut(ours[0], mask_of(*ours), place)
        if isinstance(cut, BadRow):
            return cut
        found = self.chunks(ours, theirs)  # (C, 2, 2)
        numbers = [numbered(len(whole[0]), found[:, i]) for i, whole in enumerate((ours, theirs))]
        # What is cut away takes its chunks along, and the first token has nothing before it.
        kept = [number[encoder.kept] for number, encoder in zip(numbers, encoders, strict=True)]
        whole = (found[:, :, 1] - found[:, :, 0] <= MOST).all(1)
        for i in (0, 1):
            left = np.bincount(kept[i][1:][kept[i][1:] >= 0], minlength=len(found))
            whole &= left == found[:, i, 1] - found[:, i, 0]
        names = np.append(np.where(whole, np.cumsum(whole) - 1, NO_CHUNK), NO_CHUNK)
        chunks, teacher_chunks = (names[number].astype(np.int32) for number in kept)
        ids = theirs[0][self.teacher.kept]
        last = int(np.flatnonzero(teacher_chunks >= 0)[-1]) + 1 if whole.any() else 1
        single = whole & (found[:, :, 1] - found[:, :, 0] == 1).all(1)
        starts = found[single, :, 0]
        one = int((self.twin[ours[0][starts[:, 0]]] == theirs[0][starts[:, 1]]).sum())
        return AlignedCut(
            **vars(cut), chunks=chunks, teacher_ids=ids[:last],
            teacher_chunks=teacher_chunks[:last], one_to_one=one,
        )  # fmt: skip

    def chunks(self, ours: Whole, theirs: Whole) -> np.ndarray:
        """(C, 2, 2): of every chunk the student's and the teacher's first token and the one behind.

        There is none where the templates have different numbers of targets.
        """
        found = [np.zeros((0, 2, 2), np.int64)]
        if len(ours[1]) == len(theirs[1]):
            for spans in zip(ours[1], theirs[1], strict=True):
                (a, text), (b, other) = (
                    self.text(i, whole[0], span)
                    for i, (whole, span) in enumerate(zip((ours, theirs), spans, strict=True))
                )
                found.append(between_meetings(text, other) + np.array([[a], [b]]))
        return np.concatenate(found)

    def text(self, side: int, ids: np.ndarray, span: tuple[int, int]) -> tuple[int, Text]:
        """(its first token, the text) of a span."""
        first, end = span
        if first < end and ids[first] == self.begins[side]:
            first += 1  # a beginning of text, which some tokenizers put in front
        ends = first < end and int(ids[end - 1]) in self.special[side]
        pieces = self.pieces[side]
        return first, Text([pieces[i] for i in ids[first : end - ends].tolist()], ends)


def between_meetings(ours: Text, theirs: Text) -> np.ndarray:
    """(C, 2, 2) as `AlignedEncoder.chunks`, counted from the spans' first tokens."""
    places = meeting_places(ours, theirs)
    common, *indices = np.intersect1d(*places, return_indices=True)
    # Positions counted from the end are another stretch of text than those from the beginning.
    near = (common[1:] < FAR // 2) == (common[:-1] < FAR // 2)
    return np.stack([np.stack([i[:-1], i[1:]], -1) for i in indices], 1)[near]


def meeting_places(ours: Text, theirs: Text) -> tuple[np.ndarray, np.ndarray]:
    """The place of every boundary of both texts, in numbers that are equal where they meet.

    Texts that differ, blanks at their ends aside, share what they begin and what they end with; a
    boundary elsewhere gets a number of its own.
    """
    texts = [b"".join(text.pieces) for text in (ours, theirs)]
    lead, trail = [0, 0], [0, 0]
    if texts[0] != texts[1]:
        lead, trail = different_blanks(*texts)
    cores = [text[lead[i] : len(text) - trail[i]] for i, text in enumerate(texts)]
    same = cores[0] == cores[1]
    prefix = 0 if same else common_length(*cores)
    longest = min(map(len, cores))
    suffix = longest if same else common_length(*(core[::-1] for core in cores))
    suffix = min(suffix, longest - prefix)
    found = []
    for i, text in enumerate((ours, theirs)):
        ends = np.cumsum([len(piece) for piece in text.pieces], dtype=np.int64) - lead[i]
        size = len(cores[i])
        own = -2 - i - 2 * np.arange(len(ends))  # numbers that no boundary of the other has
        place = np.where((ends > 0) & (ends <= prefix), ends, own)
        place = np.where((ends >= max(size - suffix, 1)) & (ends <= size), FAR + ends - size, place)
        start = FAR - size if same else 0
        place = np.concatenate([[start], place, [FAR + 1] if text.ends else []])
        found.append(place.astype(np.int64))
    return found[0], found[1]


def different_blanks(a: bytes, b: bytes) -> tuple[list[int], list[int]]:
    """Lengths of the blanks in front of both texts and behind them, 0 where they are the same."""
    front = [text[: len(text) - len(text.lstrip())] for text in (a, b)]
    behind = [text[len(text.rstrip()) :] if text.strip() else b"" for text in (a, b)]
    lead = [0, 0] if front[0] == front[1] else [len(x) for x in front]
    trail = [0, 0] if behind[0] == behind[1] else [len(x) for x in behind]
    return lead, trail


def common_length(a: bytes, b: bytes) -> int:
    """Bytes that both begin with."""
    n = min(len(a), len(b))
    different = np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)
    return int(different.argmax()) if different.any() else n


def numbered(length: int, chunks: np.ndarray) -> np.ndarray:
    """(T,) the number of each token's chunk of (C, 2) first tokens and ends, or NO_CHUNK."""
    found = np.full(length, NO_CHUNK)
    if len(chunks):
        tokens = np.arange(length)
        number = np.searchsorted(chunks[:, 1], tokens, side="right").clip(max=len(chunks) - 1)
        inside = (chunks[number, 0] <= tokens) & (tokens < chunks[number, 1])
        found[inside] = number[inside]
    return found


class AlignedCollator:
    """Adds the teacher's rows to a collator's batch, and which targets of both make a chunk.

    `chunks` (N,) and `teacher_chunks` are counted over the batch, in the order of targets; they stay
    on the host, where the tiles of the loss are laid out. Packed documents share rows on both sides.
    """

    def __init__(self, collator: Collator, teacher_pad_token_id: int) -> None:
        self.collator, self.flat = collator, collator.flat
        self.teacher = Collator(teacher_pad_token_id, collator.multiple, collator.flat)

    def __call__(self, rows: list[list[EncodedRow]]) -> dict:
        batch = self.collator(rows)
        rows = [[self.with_teacher(document) for document in documents] for documents in rows]
        theirs = self.teacher([[document.teacher for document in row] for row in rows])
        documents = [document for row in rows for document in row]
        counts = [max(document.chunks, default=NO_CHUNK) + 1 for document in documents]
        firsts = np.cumsum([0, *counts])
        return batch | {
            "teacher_input_ids": theirs["input_ids"],
            "teacher_position_ids": theirs["position_ids"],
            "teacher_labels": theirs["labels"],
            "chunks": counted(
                (d.labels, d.chunks, n) for d, n in zip(documents, firsts, strict=False)
            ),
            "teacher_chunks": counted(
                (d.teacher.labels, d.teacher_chunks, n)
                for d, n in zip(documents, firsts, strict=False)
            ),
        }

    def with_teacher(self, row: EncodedRow) -> AlignedRow:
        """A row that only fills up has no text for a teacher."""
        if isinstance(row, AlignedRow):
            return row
        nothing = EncodedRow([self.teacher.pad_token_id], [IGNORE_INDEX])
        return AlignedRow(row.input_ids, row.labels, [NO_CHUNK] * len(row), nothing, [NO_CHUNK])


def counted(documents: Iterable[tuple[list[int], list[int], int]]) -> np.ndarray:
    """Numbers of chunks at the targets of (labels, chunks, number of the first chunk)."""
    found = [np.zeros(0, np.int64)]
    for labels, chunks, first in documents:
        numbers = np.array(chunks, np.int64)[np.array(labels) != IGNORE_INDEX]
        found.append(np.where(numbers >= 0, numbers + first, NO_CHUNK))
    return np.concatenate(found)


def teacher_row(ids: np.ndarray, chunks: np.ndarray) -> EncodedRow:
    """The teacher's row of a document."""
    return EncodedRow(ids.tolist(), np.where(chunks >= 0, ids, IGNORE_INDEX).tolist())
