"""Read tokenised rows from a folder of the row cache.

A folder holds report.json, the ids (int32) and the mask (bool) of all rows concatenated, and the
end and the key (uint64, a hash of the text) of each row. It is mapped into memory, so the processes
of one machine share its pages. Rows that are aligned to a teacher with another tokenizer have four
more files: the teacher's ids and the ends of its rows, and the segments of both sides, whose files
are called chunks.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd.data.alignment import AlignedRow
from kd.data.encoding import EncodedRow, EncodingReport
from kd.data.packing import pack_lengths


class TokenisedRows(Sequence):
    """The rows of one cache folder. A row is a list of documents: one, or several after `packed`.

    Documents are views of the mapped files.
    """

    def __init__(self, folder: Path, bins: list[list[int]] | None = None) -> None:
        self.folder = folder
        self.ids = mapped(folder / "ids", np.int32)
        self.mask = mapped(folder / "mask", np.bool_)
        self.ends = np.fromfile(folder / "ends", np.int64)
        self.report = read_report(folder)
        self.bins = bins

    def __len__(self) -> int:
        return len(self.ends if self.bins is None else self.bins)

    def __getitem__(self, i: int) -> list[EncodedRow]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        if self.bins is None:
            return [self.document(i % len(self))]
        return [self.document(j) for j in self.bins[i]]

    def packed(self, max_length: int) -> "TokenisedRows":
        """Return the same documents packed into rows of at most max_length tokens."""
        return type(self)(self.folder, pack_lengths(self.lengths, max_length))

    def subset(self, chosen: list[int]) -> "TokenisedRows":
        """Return the chosen rows, in this order."""
        bins = [[i] for i in range(len(self))] if self.bins is None else self.bins
        return type(self)(self.folder, [bins[i] for i in chosen])

    def document(self, i: int) -> EncodedRow:
        """Return document i of the folder."""
        part = row_slice(self.ends, i)
        return EncodedRow(self.ids[part], self.mask[part])

    @property
    def keys(self) -> np.ndarray:
        """(documents,) uint64: a hash of each document's text, see `kd.data.row_checks.row_key`."""
        return np.fromfile(self.folder / "keys", np.uint64)

    @property
    def document_lengths(self) -> np.ndarray:
        """(documents,) tokens of each document."""
        return np.diff(self.ends, prepend=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.per_row(self.document_lengths)

    @property
    def longest(self) -> int:
        """The most tokens of one row that student or teacher reads."""
        return max(self.lengths)

    @property
    def targets(self) -> list[int]:
        """Target tokens of each row."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return self.per_row(np.add.reduceat(self.mask, starts, dtype=np.int64))

    def per_row(self, of_documents: np.ndarray) -> list[int]:
        """Sum a number per document (documents,) over the documents of each row."""
        if self.bins is None:
            return of_documents.tolist()
        return [int(of_documents[documents].sum()) for documents in self.bins]


class AlignedRows(TokenisedRows):
    """The rows of one cache folder with the tokens that the teacher reads for each document."""

    def __init__(self, folder: Path, bins: list[list[int]] | None = None) -> None:
        super().__init__(folder, bins)
        self.segments, self.teacher_ids, self.teacher_segments = (
            mapped(folder / name, np.int32) for name in ("chunks", "teacher_ids", "teacher_chunks")
        )
        self.teacher_ends = np.fromfile(folder / "teacher_ends", np.int64)

    @property
    def longest(self) -> int:
        """The most tokens of one row that student or teacher reads."""
        teachers = self.per_row(np.diff(self.teacher_ends, prepend=0))
        return max(super().longest, *teachers)

    def document(self, i: int) -> AlignedRow:
        """Return document i of the folder."""
        part, theirs = row_slice(self.ends, i), row_slice(self.teacher_ends, i)
        return AlignedRow(
            self.ids[part],
            self.mask[part],
            self.segments[part],
            self.teacher_ids[theirs],
            self.teacher_segments[theirs],
        )


def mapped(file: Path, dtype: type) -> np.ndarray:
    """Map a file of one array into memory, read-only."""
    return np.asarray(np.memmap(file, dtype, "r"))  # plain arrays are sliced faster than memmaps


def row_slice(ends: np.ndarray, i: int) -> slice:
    """Return the tokens of row i in a file whose rows have these ends."""
    return slice(int(ends[i - 1]) if i else 0, int(ends[i]))


def read_report(folder: Path) -> EncodingReport:
    """Read the report of a cache folder."""
    return EncodingReport(**json.loads((folder / "report.json").read_text()))
