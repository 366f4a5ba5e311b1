"""Encoded rows to batches. B batch, T tokens.

A batch has input_ids, position_ids and labels, all (B, T), the number of `tokens` (B,) that are no
padding, and no attention mask: rows are padded on
the right, which causal attention never looks at, and where documents share a row their position_ids
restart, from which Transformers derives the block-diagonal mask.
"""

import bisect
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig
from transformers.trainer_pt_utils import LengthGroupedSampler

from kd.data.encoding import IGNORE_INDEX, EncodedRow

KEYS = {"input_ids", "position_ids", "labels", "tokens"}  # of a batch
ON_POLICY = "on_policy"  # one more: (B, T) bool, the tokens of rows that the student has answered
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def check_packing(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError where documents of one row would see each other in a model.

    What keeps them apart is made of position_ids; layers that carry a state from token to token,
    and positions that are counted in another way, do not look at those.
    """
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS
    rotary = getattr(text, "rope_parameters", None) is not None
    if others or not (rotary or text.model_type == "gpt2"):
        why = f"layers of {', '.join(sorted(others))}" if others else "no rotary positions"
        raise ValueError(
            f"packing: {name} ({text.model_type}) has {why}, so nothing would keep the documents "
            "of a row apart; set packing: false, and train_sampling_strategy: group_by_length "
            "against padding"
        )


def pack(rows: list[EncodedRow], max_length: int) -> list[list[EncodedRow]]:
    """Best-fit decreasing: each row goes where the least space is left behind it."""
    return [[rows[i] for i in bin_] for bin_ in pack_lengths(list(map(len, rows)), max_length)]


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """`pack` for rows of these lengths: the indices of each bin."""
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
    """Lists of documents (one list a row) to right-padded tensors.

    `flat`: all documents of a batch in one row, B = 1. FlashAttention keeps documents apart in such
    batches alone; in two packed rows every document would see those before it, without a word.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, flat: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of
        self.flat = flat

    def __call__(self, rows: list[list[EncodedRow]]) -> dict[str, Tensor]:
        if self.flat:
            rows = [[document for documents in rows for document in documents]]
        longest = max(sum(map(len, documents)) for documents in rows)
        width = -(-longest // self.multiple) * self.multiple
        ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        positions = torch.zeros((len(rows), width), dtype=torch.long)
        for i, documents in enumerate(rows):
            for start, end, row in spans(documents):
                ids[i, start:end] = torch.tensor(row.input_ids)
                labels[i, start:end] = torch.tensor(row.labels)
                positions[i, start:end] = torch.arange(end - start)
            # Padding goes on counting: a restart would make a packed row of an unpacked one, and
            # cost it the plain causal kernel.
            positions[i, end:] = torch.arange(end - start, end - start + width - end)
        tokens = torch.tensor([sum(map(len, documents)) for documents in rows])
        return {"input_ids": ids, "position_ids": positions, "labels": labels, "tokens": tokens}


def side_by_side(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches of one collator below each other, padded on the right to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padding = {"input_ids": 0, "labels": IGNORE_INDEX} | (
        {ON_POLICY: False} if ON_POLICY in batches[0] else {}
    )
    filled: dict[str, list[Tensor]] = {name: [] for name in [*padding, "position_ids"]}
    for batch in batches:
        more = longest - batch["input_ids"].shape[1]
        for name, value in padding.items():
            filled[name].append(pad(batch[name], (0, more), value=value))
        # Goes on counting, as the collator's own padding does: a restart would be a document.
        on = torch.arange(1, more + 1, device=batch["position_ids"].device)
        positions = batch["position_ids"]
        filled["position_ids"].append(torch.cat([positions, positions[:, -1:] + on], 1))
    return {name: torch.cat(parts) for name, parts in filled.items()}


def by_length(batches: list[dict[str, Tensor]], multiple: int = 8) -> list[dict]:
    """The rows of a step's micro-batches shared out among them anew, the longest first.

    Rows of about one length pad each other least. Loss and gradient of a step are sums over its
    rows, wherever they stand. Batches stay as they are where nothing would be gained, and where
    they carry more than a Collator gives them and ON_POLICY.
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
    """Transformers' sampler with an order that seed and epoch alone decide.

    Its own draws from the global generator, whose state differs between ranks and after a restart:
    the ranks would then share rows out by different lists.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def spans(documents: list[EncodedRow]) -> Iterator[tuple[int, int, EncodedRow]]:
    start = 0
    for row in documents:
        yield start, start + len(row), row
        start += len(row)


def padding_share(
    lengths: Sequence[int], batch: int, grouped: bool = False, accumulation: int = 1
) -> float:
    """Share of padding when rows of these lengths are batched in a random order, or by length.

    The rows of a step are shared out among its micro-batches `by_length` in either case.
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
