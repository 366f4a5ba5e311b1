"""Encoded rows to batches. B batch, T tokens.

A batch has input_ids, position_ids and labels, all (B, T), and no attention mask: rows are padded on
the right, which causal attention never looks at, and where documents share a row their position_ids
restart, from which Transformers derives the block-diagonal mask.
"""

from collections.abc import Iterator

import torch

from kd.data.masks import IGNORED, EncodedRow


def pack(rows: list[EncodedRow], max_length: int) -> list[list[EncodedRow]]:
    """Best-fit decreasing: each row goes where the least space is left behind it."""
    by_space: dict[int, list[list[EncodedRow]]] = {}
    packed = []
    for row in sorted(rows, key=len, reverse=True):
        space = min((s for s in by_space if s >= len(row) and by_space[s]), default=None)
        if space is None:
            bin_, space = [], max_length
            packed.append(bin_)
        else:
            bin_ = by_space[space].pop()
        bin_.append(row)
        by_space.setdefault(space - len(row), []).append(bin_)
    return packed


class Collator:
    """Lists of documents (one list a row) to right-padded tensors."""

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of

    def __call__(self, rows: list[list[EncodedRow]]) -> dict[str, torch.Tensor]:
        longest = max(sum(map(len, documents)) for documents in rows)
        width = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for i, documents in enumerate(rows):
            for start, end, row in spans(documents):
                ids[i, start:end] = torch.tensor(row.input_ids)
                labels[i, start:end] = torch.tensor(row.labels)
                positions[i, start:end] = torch.arange(end - start)
            # Padding goes on counting: a restart would make a packed row of an unpacked one, and
            # cost it the plain causal kernel.
            positions[i, end:] = torch.arange(end - start, end - start + width - end)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


def spans(documents: list[EncodedRow]) -> Iterator[tuple[int, int, EncodedRow]]:
    start = 0
    for row in documents:
        yield start, start + len(row), row
        start += len(row)


def padding_share(rows: list[list[EncodedRow]], batch: int) -> float:
    """Share of padding when rows are batched in this order."""
    lengths = [sum(map(len, documents)) for documents in rows]
    groups = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return 1 - sum(lengths) / sum(max(group) * len(group) for group in groups)
