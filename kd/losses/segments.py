"""Chunks of the same bytes for two tokenizers, and the events that what may come next falls into.

kd/losses/cross_tokenizer.py says which, and takes the loss between them. n student tokens of a tile, m of the
teacher, c chunks, r of a block, V vocabulary, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kd.losses import elementwise
from kd.losses.objective import TeacherSignal


@dataclass(frozen=True)
class Classes:
    """How the ids of one vocabulary fall into K classes."""

    class_of: Tensor  # (V,)
    main: Tensor  # (K,) the id of each class that has a partner on the other side
    others: Tensor  # (V - K,) all other ids
    alone: Tensor  # (V,) where its class has no other id

    @staticmethod
    def of(class_of: Tensor, main: Tensor) -> "Classes":
        others = torch.ones_like(class_of, dtype=torch.bool)
        others[main] = False
        sizes = torch.bincount(class_of, minlength=len(main))
        return Classes(class_of, main, others.nonzero()[:, 0], sizes[class_of] == 1)

    def masses(self, log_p: Tensor) -> Tensor:
        """(r, K) log-probabilities of the classes, of (r, V) of the ids."""
        found = log_p.index_select(-1, self.main)
        if len(self.others):
            others, classes = log_p[:, self.others], self.class_of[self.others]
            peak = torch.full_like(found, -torch.inf)  # of each class, so that no sum underflows
            peak.scatter_reduce_(-1, classes.expand_as(others), others, "amax")
            peak.clamp_(min=torch.finfo(found.dtype).min / 4)
            rest = torch.zeros_like(found)
            rest.index_add_(-1, classes, others.sub_(peak.index_select(-1, classes)).exp_())
            found = torch.logaddexp(found, rest.log_().add_(peak))
        # Below this a class counts nothing, and its logarithm must stay finite.
        return found.clamp_(min=torch.finfo(found.dtype).min / 4)


@dataclass
class AlignedSignal(TeacherSignal):
    """What a teacher with another tokenizer gives a batch; `hidden` is at its own M targets.

    Chunks are numbered from 0 over the batch in the order of targets, and lie on the host.
    """

    labels: Tensor  # (M,) the teacher's ids
    chunks: np.ndarray  # (N,) of each student target, -1 where there is none
    teacher_chunks: np.ndarray  # (M,)
    student_classes: Classes = field(repr=False)
    teacher_classes: Classes = field(repr=False)

    @property
    def vocabulary(self) -> int:
        return len(self.teacher_classes.class_of)

    def tiles(self, most: int) -> Iterator[tuple[slice, slice]]:
        """The student's and the teacher's targets of each tile: whole chunks, `most` of either."""
        if not len(self.chunks):
            return
        begins = np.ones(len(self.chunks), bool)  # where a tile may begin
        begins[1:] = (self.chunks[1:] != self.chunks[:-1]) | (self.chunks[1:] < 0)
        ends = np.append(np.flatnonzero(begins)[1:], len(self.chunks))
        # The teacher's targets up to there: those of chunks up to the last one.
        numbers = np.maximum.accumulate(self.chunks)[ends - 1]
        behind = np.searchsorted(self.teacher_chunks, numbers, side="right")
        start = other = 0
        while start < len(self.chunks):
            fitting = (ends <= start + most) & (behind <= other + most)
            at = int(np.flatnonzero(fitting)[-1])
            yield slice(start, int(ends[at])), slice(other, int(behind[at]))
            start, other = int(ends[at]), int(behind[at])


@dataclass
class Text:
    """The tokens of each of c chunks for one model, from the rows of a tile."""

    first: Tensor  # (c,) its first row
    count: Tensor  # (c,) of its tokens
    token: Tensor  # (c,) its first token
    rest: Tensor  # (c,) log-probability of its other tokens, after the first
    not_rest: Tensor  # (c,) log(1 - exp(rest)), without cancellation
    log_not: Tensor  # (rows,) log(1 - p) of every token behind a first one
    # The same on the host, so that nothing waits for the device.
    first_rows: np.ndarray  # (c,)
    later_rows: np.ndarray  # of all tokens behind a first one
    later_chunks: np.ndarray  # their chunks


def blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that are passed over together: all on a GPU, on a CPU what stays in its cache."""
    n, vocabulary = logits.shape
    rows = n if logits.is_cuda else max(1, elementwise.BLOCK_ELEMENTS // vocabulary)
    for start in range(0, n, rows or 1):
        yield slice(start, min(start + rows, n))


def text_of(logits: Tensor, labels: Tensor, chunks: np.ndarray, temperature: float) -> Text:
    """The chunks of a tile, each of which is whole in it."""
    rows = np.flatnonzero(chunks >= 0)
    _, starts, numbers, counts = np.unique(
        chunks[rows], return_index=True, return_inverse=True, return_counts=True
    )
    first, count = (on_device(x, labels) for x in (rows[starts], counts))
    behind = np.setdiff1d(np.arange(len(rows)), starts)
    later = rows[behind]
    log_p = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    log_not = torch.zeros_like(log_p)
    for block in blocks(logits):
        mine = later[(later >= block.start) & (later < block.stop)]
        if len(mine):
            mine = on_device(mine, labels)
            scaled = logits[mine] / temperature
            total, label = scaled.logsumexp(-1), labels[mine, None]
            log_p[mine] = (scaled.gather(-1, label)[:, 0] - total).double()
            others = scaled.scatter_(-1, label, -torch.inf).logsumexp(-1)
            log_not[mine] = (others - total).double()
    width = int(counts.max(initial=1)) - 1
    steps = torch.arange(1, width + 1, device=labels.device)
    inside = steps < count[:, None]  # (c, width)
    places = (first[:, None] + steps).clamp(max=max(len(labels) - 1, 0))
    each = torch.where(inside, log_p[places], 0.0)
    before = each.cumsum(-1) - each
    fails = torch.where(inside, before + log_not[places], -torch.inf)  # here, and nowhere before
    not_rest = (
        fails.logsumexp(-1) if width else torch.full_like(count, -torch.inf, dtype=log_p.dtype)
    )
    return Text(
        first, count, labels[first], each.sum(-1), not_rest, log_not,
        rows[starts], later, numbers[behind],
    )  # fmt: skip


def on_device(indices: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(indices.astype(np.int64)).to(like.device)


@dataclass
class Partitions:
    """How the classes of each of c chunks are made finer, or coarser."""

    apart: Tensor  # (c,) the text is an event of its own
    together: Tensor  # (c,) the classes of both first tokens are one, since they differ
    ours: Tensor  # (c,) the class of the student's first token
    theirs: Tensor  # (c,)


def partitions(ours: Text, theirs: Text, signal: AlignedSignal) -> Partitions:
    left, classes = [], []
    for text, known in ((ours, signal.student_classes), (theirs, signal.teacher_classes)):
        left.append((text.count > 1) | ~known.alone[text.token])  # is anything else in its class?
        classes.append(known.class_of[text.token])
    single = (ours.count == 1) & (theirs.count == 1)
    single &= signal.student_classes.main[classes[0]] == ours.token
    single &= signal.teacher_classes.main[classes[1]] == theirs.token
    single &= classes[0] == classes[1]
    apart = left[0] & left[1] & ~single
    return Partitions(apart, ~apart & (classes[0] != classes[1]), *classes)


def image(
    log_p: Tensor, text: Text, some: slice, kinds: Partitions, known: Classes
) -> tuple[Tensor, Tensor, Tensor]:
    """((c, V) log-probabilities without the text's, (c, K) of the classes, (c,) of the text)."""
    least = torch.finfo(log_p.dtype).min / 4
    token = text.token[some, None]
    first = log_p.gather(-1, token)[:, 0]
    log_text = torch.where(kinds.apart, first + text.rest[some].to(first), least)
    left = torch.where(kinds.apart, first + text.not_rest[some].to(first), first)
    log_p.scatter_(-1, token, left[:, None])
    return log_p, known.masses(log_p), log_text


def merge(log_masses: Tensor, kinds: Partitions) -> None:
    """Take the classes of both first tokens as one, where they are to be."""
    into, away, together = (x[:, None] for x in (kinds.ours, kinds.theirs, kinds.together))
    one, other = (log_masses.gather(-1, k) for k in (into, away))
    log_masses.scatter_(-1, into, torch.where(together, torch.logaddexp(one, other), one))
    least = torch.finfo(log_masses.dtype).min / 4
    log_masses.scatter_(-1, away, torch.where(together, least, log_masses.gather(-1, away)))
