"""Byte-aligned segments of two tokenizations, and the event space on which they are compared.

kd.losses.cross_tokenizer defines the partition of next events and takes the divergence over it.

n student and m teacher tokens of a tile, s segments, r rows of a block, V vocabulary, K classes.
A block is a range of a tile's rows that is processed at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kd.losses import elementwise
from kd.losses.head import TeacherOutputs


@dataclass(frozen=True)
class TokenClasses:
    """The K classes of one vocabulary's ids."""

    class_of: Tensor  # (V,)
    main: Tensor  # (K,) the id of each class that has a partner on the other side
    others: Tensor  # (V - K,) all other ids
    alone: Tensor  # (V,) bool: the id is the only one of its class

    @classmethod
    def of(cls, class_of: Tensor, main: Tensor) -> "TokenClasses":
        """Derive `others` and `alone` from class_of (V,) and main (K,)."""
        others = torch.ones_like(class_of, dtype=torch.bool)
        others[main] = False
        sizes = torch.bincount(class_of, minlength=len(main))
        return cls(class_of, main, others.nonzero()[:, 0], sizes[class_of] == 1)

    def log_masses(self, log_p: Tensor) -> Tensor:
        """Sum log-probabilities of ids (r, V) into log-probabilities of classes (r, K)."""
        masses = log_p.index_select(-1, self.main)
        if len(self.others):
            others, classes = log_p[:, self.others], self.class_of[self.others]
            peak = torch.full_like(masses, -torch.inf)  # of each class, so that no sum underflows
            peak.scatter_reduce_(-1, classes.expand_as(others), others, "amax")
            peak.clamp_(min=negligible(masses))
            rest = torch.zeros_like(masses)
            rest.index_add_(-1, classes, others.sub_(peak.index_select(-1, classes)).exp_())
            masses = torch.logaddexp(masses, rest.log_().add_(peak))
        return masses.clamp_(min=negligible(masses))


def negligible(like: Tensor) -> float:
    """Return a log-probability (scalar) that stands for 0 and stays finite in sums."""
    return torch.finfo(like.dtype).min / 4


@dataclass
class AlignedTeacherOutputs(TeacherOutputs):
    """Outputs of a teacher with another tokenizer: hidden states at its own M targets.

    Segments are numbered from 0 over the batch, in the order of targets. Their arrays are on the
    host.
    """

    labels: Tensor  # (M,) the teacher's target ids
    segments: np.ndarray  # (N,) the segment of each student target, or -1
    teacher_segments: np.ndarray  # (M,) the segment of each teacher target
    student_classes: TokenClasses = field(repr=False)
    teacher_classes: TokenClasses = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """The number of the teacher's ids."""
        return len(self.teacher_classes.class_of)

    def tiles(self, max_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield the student's and the teacher's targets of each tile.

        A tile holds whole segments, and at most `max_tokens` targets of either side.
        """
        if not len(self.segments):
            return
        begins = np.ones(len(self.segments), bool)  # targets at which a tile may begin
        begins[1:] = (self.segments[1:] != self.segments[:-1]) | (self.segments[1:] < 0)
        ends = np.append(np.flatnonzero(begins)[1:], len(self.segments))
        # The teacher's targets of all segments up to each of these ends.
        last_segments = np.maximum.accumulate(self.segments)[ends - 1]
        teacher_ends = np.searchsorted(self.teacher_segments, last_segments, side="right")
        start = teacher_start = 0
        while start < len(self.segments):
            fits = (ends <= start + max_tokens) & (teacher_ends <= teacher_start + max_tokens)
            last = int(np.flatnonzero(fits)[-1])
            end, teacher_end = int(ends[last]), int(teacher_ends[last])
            yield slice(start, end), slice(teacher_start, teacher_end)
            start, teacher_start = end, teacher_end


@dataclass
class SegmentLogProbs:
    """Log-probabilities of the tokens of s segments under one model, from the rows of a tile."""

    first: Tensor  # (s,) row of the first token
    count: Tensor  # (s,) number of tokens
    token: Tensor  # (s,) id of the first token
    rest: Tensor  # (s,) log-probability of the tokens after the first
    not_rest: Tensor  # (s,) log(1 - exp(rest)), without cancellation
    log_not: Tensor  # (rows,) log(1 - p) of every token after a first one
    # On the host, so that nothing waits for the device:
    first_rows: np.ndarray  # (s,) as `first`
    later_rows: np.ndarray  # rows of all tokens after a first one
    later_segments: np.ndarray  # their segments


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Yield blocks of rows of (n, V) logits: all rows on a GPU, what fits the cache on a CPU."""
    n, vocab_size = logits.shape
    rows = n if logits.is_cuda else max(1, elementwise.BLOCK_ELEMENTS // vocab_size)
    for start in range(0, n, rows or 1):
        yield slice(start, min(start + rows, n))


def segment_log_probs(
    logits: Tensor, labels: Tensor, segments: np.ndarray, temperature: float
) -> SegmentLogProbs:
    """Compute the log-probabilities of a tile's segments, each of which is whole in the tile.

    Args:
        logits: (n, V).
        labels: (n,) target ids.
        segments: (n,) the segment of each target, or -1.
        temperature: Softmax temperature.
    """
    rows = np.flatnonzero(segments >= 0)
    _, starts, numbers, counts = np.unique(
        segments[rows], return_index=True, return_inverse=True, return_counts=True
    )
    first, count = (index_tensor(x, labels) for x in (rows[starts], counts))
    later = np.setdiff1d(np.arange(len(rows)), starts)
    later_rows = rows[later]
    log_p = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    log_not = torch.zeros_like(log_p)
    for block in row_blocks(logits):
        inside = later_rows[(later_rows >= block.start) & (later_rows < block.stop)]
        if len(inside):
            inside = index_tensor(inside, labels)
            scaled = elementwise.scaled_logits(logits[inside], temperature)
            total, label = scaled.logsumexp(-1), labels[inside, None]
            log_p[inside] = (scaled.gather(-1, label)[:, 0] - total).double()
            others = scaled.scatter_(-1, label, -torch.inf).logsumexp(-1)
            log_not[inside] = (others - total).double()
    width = int(counts.max(initial=1)) - 1
    steps = torch.arange(1, width + 1, device=labels.device)
    valid = steps < count[:, None]  # (s, width)
    places = (first[:, None] + steps).clamp(max=max(len(labels) - 1, 0))
    each = torch.where(valid, log_p[places], 0.0)
    before = each.cumsum(-1) - each
    # The rest does not occur if one of its tokens is the first that does not.
    first_miss = torch.where(valid, before + log_not[places], -torch.inf)
    not_rest = (
        first_miss.logsumexp(-1) if width else torch.full_like(count, -torch.inf, dtype=log_p.dtype)
    )
    return SegmentLogProbs(
        first, count, labels[first], each.sum(-1), not_rest, log_not,
        rows[starts], later_rows, numbers[later],
    )  # fmt: skip


def index_tensor(indices: np.ndarray, like: Tensor) -> Tensor:
    """Copy indices (n,) to the device of `like`, as int64."""
    return torch.from_numpy(indices.astype(np.int64)).to(like.device)


@dataclass
class EventPartition:
    """How the partition of each of s segments differs from the K classes.

    `separate` and `merged` exclude each other.
    """

    separate: Tensor  # (s,) bool: the segment's text is an event of its own
    merged: Tensor  # (s,) bool: the classes of both first tokens, which differ, are one event
    student_class: Tensor  # (s,) the class of the student's first token
    teacher_class: Tensor  # (s,) the class of the teacher's first token


def event_partition(
    ours: SegmentLogProbs, theirs: SegmentLogProbs, outputs: AlignedTeacherOutputs
) -> EventPartition:
    """Choose the partition of each segment, such that no event is empty on one side only."""
    nonempty, classes = [], []  # nonempty: the class of the first token holds more than the text
    for text, known in ((ours, outputs.student_classes), (theirs, outputs.teacher_classes)):
        nonempty.append((text.count > 1) | ~known.alone[text.token])
        classes.append(known.class_of[text.token])
    single_pair = (ours.count == 1) & (theirs.count == 1)
    single_pair &= outputs.student_classes.main[classes[0]] == ours.token
    single_pair &= outputs.teacher_classes.main[classes[1]] == theirs.token
    single_pair &= classes[0] == classes[1]
    separate = nonempty[0] & nonempty[1] & ~single_pair
    return EventPartition(separate, ~separate & (classes[0] != classes[1]), *classes)


def class_log_probs(
    log_p: Tensor,
    text: SegmentLogProbs,
    chosen: slice,
    partition: EventPartition,
    known: TokenClasses,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map next-token distributions at first tokens to classes and the segment's text.

    Args:
        log_p: (s, V) log-probabilities at the first tokens of the chosen segments; overwritten.
        text: The segments of the tile.
        chosen: The segments among them.
        partition: The partition of the chosen segments.
        known: The classes of this vocabulary.

    Returns:
        log_p without the text's probability (s, V), the classes' log-probabilities (s, K) and the
        text's (s,).
    """
    token = text.token[chosen, None]
    first = log_p.gather(-1, token)[:, 0]
    separate = partition.separate
    log_text = torch.where(separate, first + text.rest[chosen].to(first), negligible(log_p))
    remainder = torch.where(separate, first + text.not_rest[chosen].to(first), first)
    log_p.scatter_(-1, token, remainder[:, None])
    return log_p, known.log_masses(log_p), log_text


def merge_classes(log_masses: Tensor, partition: EventPartition) -> None:
    """Where the partition says so, add the teacher token's class to the student token's, in place.

    `log_masses` is (s, K); the mass of the teacher token's class becomes negligible.
    """
    into, away, merged = (
        x[:, None] for x in (partition.student_class, partition.teacher_class, partition.merged)
    )
    one, other = (log_masses.gather(-1, k) for k in (into, away))
    log_masses.scatter_(-1, into, torch.where(merged, torch.logaddexp(one, other), one))
    kept = log_masses.gather(-1, away)
    log_masses.scatter_(-1, away, torch.where(merged, negligible(log_masses), kept))
