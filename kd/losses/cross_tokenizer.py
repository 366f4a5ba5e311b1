"""The loss of a tile where the teacher has another tokenizer: over common classes of next tokens.

The targets of both models are cut into chunks of the same bytes (kd.data.alignment). At the first
token of a chunk both next-token distributions are mapped to K classes, a token each that both
vocabularies have (kd.data.vocabularies), and a divergence is taken between the images. Where a
chunk has several tokens, its whole text is one event more: with a the student's tokens,

    P(text) = q(a_1) q(a_2 | a_1) ... q(a_n | a_1 ... a_{n-1}),    and so for the teacher's own tokens.

It is taken out of the class of the first token on each side, so that the partition is {the text, its
class without it, all other classes}; where that would leave a class empty on one side alone, the
classes of both first tokens are taken as one instead. Each is a partition of what may come next, for
both models, hence the divergence a true one, 0 where the images are equal. A chunk counts once, however
many tokens it has: the KL divergence of two texts is the sum over their pieces (chain rule), and
mapping what may come next to fewer events never raises it (data processing inequality). Targets in
no chunk have cross-entropy alone; the loss is divided by all targets of the student, as ever. Equal
vocabularies have one class a token and chunks of one token: the ordinary loss. All log-probabilities
in the divergence are at the objective's temperature, token by token. Agreement is that of the likeliest
tokens' classes at the first token of a chunk, counted for all of its student tokens.

n student tokens of a tile, m of the teacher, c chunks, r of a block, V vocabulary, K classes.
"""

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vecdot

from kd.losses import elementwise
from kd.losses.objective import METRICS, Head, Objective
from kd.losses.segments import (
    AlignedSignal,
    Partitions,
    Text,
    blocks,
    image,
    merge,
    on_device,
    partitions,
    text_of,
)

LEAST_TOKENS = 32  # of a tile on either side: the longest chunk
SCRATCH = 8  # blocks (r, V)


def tile_figures(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    signal: AlignedSignal,
    tile: tuple[slice, slice],
    student_head: Head,
    objective: Objective,
    gradient: Tensor | None,
) -> Tensor:
    """As elementwise.tile_figures, of the bare products student (n, V) and teacher (m, V)."""
    sums = torch.zeros(len(METRICS), dtype=torch.float64, device=student.device)
    teacher_labels = signal.labels[tile[1]]
    chunks, teacher_chunks = signal.chunks[tile[0]], signal.teacher_chunks[tile[1]]
    for logits, head in ((student, student_head), (teacher, signal.head)):
        for block in blocks(logits):
            head.finish_(logits[block])
    ours = text_of(student, labels, chunks, objective.temperature)
    theirs = text_of(teacher, teacher_labels, teacher_chunks, objective.temperature)
    kinds = partitions(ours, theirs, signal)
    slopes = torch.zeros(len(labels), 3, dtype=torch.float64, device=student.device)
    done = 0  # chunks
    for block in blocks(student):
        logits = student[block]  # (r, V)
        end = int(np.searchsorted(ours.first_rows, block.stop))
        figures, logits_gradient = cross_entropy_figures(
            logits, labels[block, None], objective, gradient is not None
        )
        if end > done:
            some = slice(done, end)
            soft, agreement, soft_gradient, slope = block_figures(
                student, teacher, some, ours, theirs, kinds, signal, objective
            )
            figures["divergence"] = soft * objective.divergence_scale
            figures["top1_agreement"] = agreement * ours.count[some]
            mine = (ours.later_chunks >= done) & (ours.later_chunks < end)
            later = on_device(ours.later_rows[mine], slopes)
            slopes[later] = slope[on_device(ours.later_chunks[mine] - done, slopes)]
            if gradient is not None:
                rows = ours.first[some] - block.start
                logits_gradient.index_add_(0, rows, weighed(soft_gradient, objective))
        if gradient is not None:
            add_slopes(logits_gradient, logits, labels, block, slopes, ours, objective)
            gradient[block] = student_head.unfinish_(logits_gradient, logits)
        sums += totals(figures)
        done = end
    sums += teacher_totals(teacher, teacher_labels, theirs, ours)
    return sums


def block_figures(
    student: Tensor,
    teacher: Tensor,
    some: slice,
    ours: Text,
    theirs: Text,
    kinds: Partitions,
    signal: AlignedSignal,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the chunks `some`: (value (c,), agreement (c,), gradient (c, V) with respect to the
    student's logits / temperature at first tokens, slope (c, 3)). That to the log-probability of the
    other tokens is slope[0] - slope[1] exp(slope[2])."""
    heads = student[ours.first[some]], teacher[theirs.first[some]]
    likeliest = [elementwise.argmax(x)[:, 0] for x in heads]
    agreement = (
        signal.student_classes.class_of[likeliest[0]]
        == signal.teacher_classes.class_of[likeliest[1]]
    ).to(student.dtype)
    kinds = Partitions(*(x[some] for x in vars(kinds).values()))
    rows = torch.arange(len(agreement), device=student.device)
    images = []
    for logits, text, known in (
        (heads[0], ours, signal.student_classes),
        (heads[1], theirs, signal.teacher_classes),
    ):
        log_p = torch.log_softmax(logits / objective.temperature, -1)
        images.append(image(log_p, text, some, kinds, known))
    (log_q, masses, log_text), (_, log_masses, log_teacher_text) = images
    for log in (masses, log_masses):
        merge(log, kinds)
    log_classes = torch.cat([masses, log_text[:, None]], -1)  # (c, K + 1)
    log_p = torch.cat([log_masses, log_teacher_text[:, None]], -1)
    value, slopes = elementwise.divergence_of_classes(log_p, log_classes, objective)
    text_slope, slopes = slopes[:, -1], slopes[:, :-1].clone()
    for found in (slopes, masses):  # a token's share is that of the common class
        common, own = (found.gather(-1, k[:, None]) for k in (kinds.ours, kinds.theirs))
        found.scatter_(-1, kinds.theirs[:, None], torch.where(kinds.together[:, None], common, own))
    class_of = signal.student_classes.class_of
    shares = log_q.sub_(masses.index_select(-1, class_of)).exp_()
    gradient = shares.mul_(slopes.index_select(-1, class_of))  # (c, V)
    gradient[rows, ours.token[some]] += text_slope
    mine = rows, kinds.ours
    ratio = log_text.double() - masses[mine].double()
    slope = torch.stack([text_slope.double(), slopes[mine].double(), ratio], -1)
    slope = torch.where(kinds.apart[:, None], slope, 0.0)
    return value[:, 0], agreement, gradient, slope


def weighed(soft: Tensor, objective: Objective) -> Tensor:
    """The part of the loss's gradient that a gradient to logits / temperature makes, in place."""
    scale = objective.divergence_scale / objective.temperature
    return soft.mul_(objective.soft_weight * scale)


def add_slopes(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    block: slice,
    slopes: Tensor,
    text: Text,
    objective: Objective,
) -> None:
    """Add the gradient of tokens behind the first, label - q times the slope, at rows of a block.

    A slope may be too large for its type where q is all but 1, and label - q then as small: the two
    are multiplied as logarithms, whose sum is at most 0.
    """
    later = text.later_rows
    later = later[(later >= block.start) & (later < block.stop)] - block.start
    if not len(later):
        return
    rows = on_device(later, slopes)
    of_text, of_class, ratio = slopes[block][rows].to(logits).unbind(-1)
    of_text, of_class, ratio = of_text[:, None], of_class[:, None], ratio[:, None]
    log_q = torch.log_softmax(logits[rows] / objective.temperature, -1)
    log_not = text.log_not[block][rows, None].to(logits)
    at_label = of_text * log_not.exp() - of_class * (ratio + log_not).clamp_(max=0).exp()
    found = (log_q + ratio).clamp_(max=0).exp_().mul_(of_class)
    found.sub_(log_q.exp_().mul_(of_text))
    found.scatter_(-1, labels[block][rows, None], at_label)
    gradient.index_add_(0, rows, weighed(found, objective))


def cross_entropy_figures(
    logits: Tensor, labels: Tensor, objective: Objective, with_gradient: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(figures of every student token, gradient (r, V) of its cross-entropy's part of the loss)."""
    log_q = torch.log_softmax(logits, -1)
    q = log_q.exp()
    hard = -log_q.gather(-1, labels)[:, 0]
    figures = {"cross_entropy": hard, "student_entropy": -vecdot(q, log_q)}
    weight = objective.soft_weight
    if not with_gradient:
        return figures, None
    if weight == 1.0:
        return figures, q.zero_()
    gradient = q.mul_(1 - weight)
    return figures, gradient.scatter_add_(-1, labels, torch.full_like(hard, weight - 1)[:, None])


def totals(figures: dict[str, Tensor]) -> Tensor:
    """(len(METRICS),) sums, in float64, of figures by name."""
    hard = figures["cross_entropy"]
    zero = torch.zeros((), dtype=torch.float64, device=hard.device)
    figures = figures | {"tokens": torch.ones_like(hard)}
    return torch.stack(
        [figures[x].sum(dtype=torch.float64) if x in figures else zero for x in METRICS]
    )


def teacher_totals(teacher: Tensor, labels: Tensor, theirs: Text, ours: Text) -> Tensor:
    """What the teacher alone says of the text, at temperature 1.

    Its entropies and cross-entropies are those of its own tokens, and the probability of a label is
    the mean one of a chunk's student tokens.
    """
    hard = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    entropy = torch.zeros_like(hard)
    for block in blocks(teacher):
        log_p = torch.log_softmax(teacher[block], -1)
        hard[block] = -log_p.gather(-1, labels[block, None])[:, 0].double()
        entropy[block] = -vecdot(log_p.exp(), log_p).double()
    ends = torch.cat([hard.new_zeros(1), hard.cumsum(0)])
    of_chunk = ends[theirs.first + theirs.count] - ends[theirs.first]
    probability = ours.count * (-of_chunk / ours.count).exp()
    figures = {"teacher_cross_entropy": hard, "teacher_entropy": entropy}
    figures |= {"teacher_label_probability": probability}
    sums = totals(figures | {"cross_entropy": hard})
    for name in ("cross_entropy", "tokens"):
        sums[METRICS.index(name)] = 0.0
    return sums
