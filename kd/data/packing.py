"""Encoded rows to batches: packing, padding and the order of rows. B batch, T tokens.

A batch has input_ids, position_ids and labels, all (B, T), and the number of `tokens` (B,) that are
not padding. It has no attention mask: rows are padded on the right, where causal attention never
looks. If documents share a row, position_ids restart at each document, and Transformers derives the
block-diagonal mask from that.

A flat batch, for FlashAttention, also has the bounds of its documents (BOUNDS), because every layer
would otherwise wait for the device to find them in position_ids.
"""

import bisect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Sampler
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import LengthGroupedSampler

from kd.data.encoding import IGNORE_INDEX, EncodedRow

KEYS = {"input_ids", "position_ids", "labels", "tokens"}  # of a batch
# Transformers' names: first positions of the documents and T, (documents + 1,) int32; the greatest
# length, an int.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
ON_POLICY = "on_policy"  # optional key: (B, T) bool, the tokens of rows that the student answered
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def check_packing(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError if documents of one row would see each other in this model.

    Attention layers keep them apart by position_ids. Layers that carry a state from token to token
    ignore position_ids, and so do models whose positions are not rotary; GPT-2 is the exception.
    """
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS
    rotary = getattr(text, "rope_parameters", None) is not None
    if others or not (rotary or text.model_type == "gpt2"):
        why = f"layers of {', '.join(sorted(others))}" if others else "no rotary positions"
        raise ValueError(
            f"packing: {name} ({text.model_type}) has {why}, so documents that share a row would "
            "see each other; set packing: false, and train_sampling_strategy: group_by_length to "
            "reduce padding"
        )


def pack(rows: list[EncodedRow], max_length: int) -> list[list[EncodedRow]]:
    """Pack rows into bins of max_length tokens by best-fit decreasing.

    Each row, longest first, goes into the bin where it leaves the least space.
    """
    return [[rows[i] for i in bin_] for bin_ in pack_lengths(list(map(len, rows)), max_length)]


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return the indices of each bin of `pack` for rows of these lengths."""
    by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # the keys of by_space in order
    packed = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        place = bisect.bisect_left(spaces, lengths[i])
        if place == len(spaces):
            bin_, space = [], max_length
            packed.append(bin_)
        else:
            space = spaces[place]
            bin_ = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        bin_.append(i)
        left = space - lengths[i]
        if left not in by_space:
            by_space[left] = []
            bisect.insort(spaces, left)
        by_space[left].append(bin_)
    return packed


class Collator:
    """Collates rows, each a list of documents, into right-padded tensors.

    With `flat` all documents of a batch share one row, B = 1, and the batch has BOUNDS.
    FlashAttention keeps documents apart only in such a batch; in two packed rows every document
    would silently see those before it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, flat: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of
        self.flat = flat

    def __call__(self, rows: list[list[EncodedRow]]) -> dict[str, Tensor | int]:
        """Collate rows into (B, T) tensors, T a multiple of pad_to_multiple_of."""
        if self.flat:
            rows = [[document for documents in rows for document in documents]]
        longest = max(sum(map(len, documents)) for documents in rows)
        width = -(-longest // self.multiple) * self.multiple
        ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        positions = np.zeros((len(rows), width), np.int64)
        for i, documents in enumerate(rows):
            for start, end, row in document_spans(documents):
                ids[i, start:end] = row.input_ids
                labels[i, start:end] = row.labels
                positions[i, start:end] = np.arange(end - start)
            # Padding goes on counting: a restart would mark an unpacked row as packed and cost it
            # the plain causal kernel.
            positions[i, end:] = np.arange(end - start, end - start + width - end)
        tokens = torch.tensor([sum(map(len, documents)) for documents in rows])
        arrays = {"input_ids": ids, "position_ids": positions, "labels": labels}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["tokens"] = tokens
        return batch | (flat_bounds(rows[0], width) if self.flat else {})


def flat_bounds(documents: list[EncodedRow], width: int) -> dict[str, Tensor | int]:
    """The BOUNDS of documents that share a row of `width` positions; the last has the padding."""
    bounds = torch.tensor([*(start for start, _, _ in document_spans(documents)), width])
    longest = int(bounds.diff().max())
    bounds = bounds.to(torch.int32)
    return dict(zip(BOUNDS, (bounds, bounds, longest, longest), strict=True))


def bounds_of(batch: Mapping[str, Any]) -> dict[str, Tensor | int]:
    """The BOUNDS of a batch, which only a flat one has: more arguments of the model."""
    return {name: batch[name] for name in BOUNDS if name in batch}


def document_spans(documents: list[EncodedRow]) -> Iterator[tuple[int, int, EncodedRow]]:
    """Yield (start, end, document) of every document of a row."""
    start = 0
    for row in documents:
        yield start, start + len(row), row
        start += len(row)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def side_by_side(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate batches along B, each (B_i, T_i), padded on the right to the longest T."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padding = {"input_ids": 0, "labels": IGNORE_INDEX} | (
        {ON_POLICY: False} if ON_POLICY in batches[0] else {}
    )
    filled: dict[str, list[Tensor]] = {name: [] for name in [*padding, "position_ids"]}
    for batch in batches:
        more = longest - batch["input_ids"].shape[1]
        for name, value in padding.items():
            filled[name].append(pad(batch[name], (0, more), value=value))
        # Positions go on counting, as in the collator's padding: a restart would begin a document.
        on = torch.arange(1, more + 1, device=batch["position_ids"].device)
        positions = batch["position_ids"]
        filled["position_ids"].append(torch.cat([positions, positions[:, -1:] + on], 1))
    return {name: torch.cat(parts) for name, parts in filled.items()}


def by_length(batches: list[dict[str, Tensor]], multiple: int = 8) -> list[dict]:
    """Redistribute the rows of a step's micro-batches by length, the longest first.

    Rows of similar length need the least padding. Loss and gradient of a step are sums over its
    rows, so the micro-batch of a row does not matter. Batches are returned unchanged if this saves
    no padding, or if they have keys other than KEYS and ON_POLICY.
    """
    keys = KEYS | {ON_POLICY} & batches[0].keys()
    if len(batches) < 2 or any(batch.keys() != keys for batch in batches):
        return batches
    tokens = torch.cat([batch["tokens"] for batch in batches])
    lengths, order = (part.tolist() for part in tokens.sort(descending=True, stable=True))
    wide, shared, start = side_by_side(batches) | {"tokens": tokens}, [], 0
    for size in (len(batch["tokens"]) for batch in batches):
        width = -(-lengths[start] // multiple) * multiple
        rows = order[start : start + size]
        shared.append({k: v[rows, :width] if v.ndim > 1 else v[rows] for k, v in wide.items()})
        start += size
    before, after = (sum(b["input_ids"].numel() for b in parts) for parts in (batches, shared))
    return shared if after < before else batches


class GroupedByLength(LengthGroupedSampler):
    """Transformers' length-grouped sampler, with an order that depends only on seed and epoch.

    The original draws from the global generator, whose state differs between ranks and after a
    restart; the ranks would then distribute different lists of rows.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class FilledUp(Sequence):
    """Rows, then as many blank ones, which have no target, as make the length a multiple.

    All ranks need equally many batches. A prepared DataLoader would repeat rows to get there, and
    the repeated rows would count twice.
    """

    def __init__(self, rows: Sequence[list[EncodedRow]], multiple: int) -> None:
        self.rows = rows
        self.blank = [EncodedRow(rows[0][0].input_ids[:1], np.zeros(1, np.bool_))]
        self.length = len(rows) + -len(rows) % multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> list[EncodedRow]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.rows[i] if i < len(self.rows) else self.blank


class FilledUpOrder(Sampler[int]):
    """The order of a sampler of the real rows, then the blank rows.

    Asks for the `epoch` itself. Accelerate does not pass it on to the sampler of a run that several
    ranks resume within an epoch; they would go on in the order of epoch 0.
    """

    def __init__(self, sampler: Sampler[int], rows: FilledUp, epoch: Callable[[], int]) -> None:
        self.sampler, self.rows, self.epoch = sampler, rows, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        self.sampler.epoch = self.epoch()
        yield from self.sampler
        yield from range(len(self.rows.rows), len(self.rows))


def padding_share(
    lengths: Sequence[int], batch: int, grouped: bool = False, accumulation: int = 1
) -> float:
    """Return the share of padding among the positions of batches of rows of these lengths.

    Rows are batched in a random order, or by length if `grouped`. Within a step they are
    redistributed `by_length` in both cases.
    """
    lengths, step = list(lengths), batch * accumulation
    random.Random(0).shuffle(lengths)
    if grouped:
        lengths.sort()
    groups = []
    for start in range(0, len(lengths), step):
        rows = sorted(lengths[start : start + step], reverse=True)
        groups += [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return 1 - sum(lengths) / sum(max(group) * len(group) for group in groups)
