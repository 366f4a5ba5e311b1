"""Distillation loss of a tile for a teacher with another tokenizer, over common classes of tokens.

The targets of both models are divided into segments of the same bytes (kd.data.alignment). At the
first token of a segment, both next-token distributions are mapped to K classes, one for every token
that both vocabularies have (kd.data.vocabularies). The loss takes a divergence between the mapped
distributions. If a segment has several tokens, its text is one more event. By the chain rule, with
the student's tokens a, and likewise with the teacher's own tokens,

    P(text) = q(a_1) q(a_2 | a_1) ... q(a_n | a_1 ... a_{n-1}).

P(text) is taken out of the class of the first token on each side. The events are then the text, the
rest of its class, and all other classes. Where that would leave a class empty on one side only, the
classes of both first tokens are merged instead. In either case the events are a partition of what
may come next, for both models. So the divergence is a true one, 0 if the mapped distributions are
equal, and at most that of the text itself (data processing inequality).

A segment counts once, however many tokens it has: the KL divergence of two texts is the sum over
their segments (chain rule). Targets in no segment have cross-entropy only. As in the ordinary loss,
the sum is divided by the number of all student targets. With equal vocabularies there is one class
per token and one token per segment, which is the ordinary loss. All log-probabilities in the
divergence are at the objective's temperature. top1_agreement compares the classes of the most
likely tokens at the first token of a segment, and counts for all student tokens of the segment.

GOLD (TRL) multiplies the probabilities of a segment's tokens, too. Where vocabularies differ, it
compares sorted probabilities, as ULD does (Boizard et al. 2024, arXiv 2402.12030). Sorting compares
probabilities of unrelated tokens, so that loss can be 0 for different distributions.

n student and m teacher tokens of a tile, s segments, r rows of a block, V vocabulary, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from kd.losses import elementwise
from kd.losses.head import Head
from kd.losses.metrics import TOKEN_METRICS
from kd.losses.segments import (
    AlignedTeacherOutputs,
    EventPartition,
    SegmentLogProbs,
    class_log_probs,
    event_partition,
    index_tensor,
    merge_classes,
    row_blocks,
    segment_log_probs,
)
from kd.settings.distillation import Objective

MIN_TILE_TOKENS = 32  # of a tile on either side: the longest segment
SCRATCH = 8  # tensors (r, V)


def tile_metrics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    outputs: AlignedTeacherOutputs,
    tile: tuple[slice, slice],
    student_head: Head,
    objective: Objective,
    gradient: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """Compute the metric sums of a tile and, where `gradient` is given, fill it.

    Args:
        student: (n, V) product of the student's head; overwritten.
        teacher: (m, V of the teacher) product of the teacher's head; overwritten.
        labels: (n,) the student's target ids.
        outputs: The teacher's outputs for the batch.
        tile: The student's and the teacher's targets of this tile.
        student_head: Finishes the student's product.
        objective: The loss.
        gradient: (n, V), as in `kd.losses.elementwise.tile_metrics`, or None.
        scales: (n,), likewise, or None.

    Returns:
        (len(TOKEN_METRICS),) sums in float64.
    """
    sums = torch.zeros(len(TOKEN_METRICS), dtype=torch.float64, device=student.device)
    teacher_labels = outputs.labels[tile[1]]
    segments, teacher_segments = outputs.segments[tile[0]], outputs.teacher_segments[tile[1]]
    for logits, head in ((student, student_head), (teacher, outputs.head)):
        for block in row_blocks(logits):
            head.finish_(logits[block])
    ours = segment_log_probs(student, labels, segments, objective.temperature)
    theirs = segment_log_probs(teacher, teacher_labels, teacher_segments, objective.temperature)
    partition = event_partition(ours, theirs, outputs)
    slopes = torch.zeros(len(labels), 3, dtype=torch.float64, device=student.device)
    done = 0  # segments
    for block in row_blocks(student):
        logits = student[block]  # (r, V)
        end = int(np.searchsorted(ours.first_rows, block.stop))
        metrics, logits_gradient = cross_entropy_metrics(
            logits, labels[block, None], objective, gradient is not None
        )
        if end > done:
            chosen = slice(done, end)
            divergence, agreement, soft_gradient, slope = segment_divergence(
                student, teacher, chosen, ours, theirs, partition, outputs, objective
            )
            metrics["divergence"] = divergence * objective.divergence_scale
            metrics["top1_agreement"] = agreement * ours.count[chosen]
            inside = (ours.later_segments >= done) & (ours.later_segments < end)
            later = index_tensor(ours.later_rows[inside], slopes)
            slopes[later] = slope[index_tensor(ours.later_segments[inside] - done, slopes)]
            if gradient is not None:
                rows = ours.first[chosen] - block.start
                logits_gradient.index_add_(0, rows, scale_gradient_(soft_gradient, objective))
        if gradient is not None:
            add_later_gradient(logits_gradient, logits, labels, block, slopes, ours, objective)
            found = student_head.unfinish_(logits_gradient, logits)
            elementwise.store(found, gradient[block], None if scales is None else scales[block])
        sums += metric_sums(metrics)
        done = end
    sums += teacher_sums(teacher, teacher_labels, theirs, ours)
    return sums


def segment_divergence(
    student: Tensor,
    teacher: Tensor,
    chosen: slice,
    ours: SegmentLogProbs,
    theirs: SegmentLogProbs,
    partition: EventPartition,
    outputs: AlignedTeacherOutputs,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the divergence of the chosen segments and its gradient.

    Args:
        student: (n, V) logits.
        teacher: (m, V of the teacher) logits.
        chosen: The s segments to compute.
        ours: The tile's segments under the student.
        theirs: The same segments under the teacher.
        partition: Their events.
        outputs: The teacher's outputs, for the classes.
        objective: The loss.

    Returns:
        The divergence (s,); the agreement (s,), 0 or 1; the gradient (s, V) with respect to the
        student's logits / temperature at first tokens; and `slope` (s, 3). The derivative with
        respect to the log-probability of the later tokens is slope[0] - slope[1] exp(slope[2]).
    """
    heads = student[ours.first[chosen]], teacher[theirs.first[chosen]]
    most_likely = [elementwise.argmax(x)[:, 0] for x in heads]
    agreement = (
        outputs.student_classes.class_of[most_likely[0]]
        == outputs.teacher_classes.class_of[most_likely[1]]
    ).to(student.dtype)
    partition = EventPartition(*(x[chosen] for x in vars(partition).values()))
    rows = torch.arange(len(agreement), device=student.device)
    mapped = []
    for logits, text, known in (
        (heads[0], ours, outputs.student_classes),
        (heads[1], theirs, outputs.teacher_classes),
    ):
        log_p = torch.log_softmax(elementwise.scaled_logits(logits, objective.temperature), -1)
        mapped.append(class_log_probs(log_p, text, chosen, partition, known))
    (log_q, log_masses, log_text), (_, teacher_log_masses, teacher_log_text) = mapped
    for masses in (log_masses, teacher_log_masses):
        merge_classes(masses, partition)
    log_events = torch.cat([log_masses, log_text[:, None]], -1)  # (s, K + 1)
    teacher_log_events = torch.cat([teacher_log_masses, teacher_log_text[:, None]], -1)
    value, slopes = elementwise.class_divergence(teacher_log_events, log_events, objective)
    text_slope, slopes = slopes[:, -1], slopes[:, :-1].clone()
    merged, teacher_class = partition.merged[:, None], partition.teacher_class[:, None]
    for found in (slopes, log_masses):  # tokens of both merged classes share that of the event
        event = found.gather(-1, partition.student_class[:, None])
        found.scatter_(
            -1, teacher_class, torch.where(merged, event, found.gather(-1, teacher_class))
        )
    class_of = outputs.student_classes.class_of
    shares = log_q.sub_(log_masses.index_select(-1, class_of)).exp_()  # of each token in its class
    gradient = shares.mul_(slopes.index_select(-1, class_of))  # (s, V)
    gradient[rows, ours.token[chosen]] += text_slope
    own_class = rows, partition.student_class
    log_ratio = log_text.double() - log_masses[own_class].double()
    slope = torch.stack([text_slope.double(), slopes[own_class].double(), log_ratio], -1)
    slope = torch.where(partition.separate[:, None], slope, 0.0)
    return value[:, 0], agreement, gradient, slope


def scale_gradient_(gradient: Tensor, objective: Objective) -> Tensor:
    """Scale a gradient (*, V) to logits / temperature into the loss's to logits, in place."""
    scale = objective.divergence_scale / objective.temperature
    return gradient.mul_(objective.soft_weight * scale)


def add_later_gradient(
    gradient: Tensor,
    logits: Tensor,
    labels: Tensor,
    block: slice,
    slopes: Tensor,
    text: SegmentLogProbs,
    objective: Objective,
) -> None:
    """Add the divergence's gradient at tokens after the first: (label - q) times the derivative.

    The derivative may exceed the range of its dtype where q is nearly 1; label - q is then as
    small. So both are multiplied as logarithms, whose sum is at most 0.

    Args:
        gradient: (r, V) gradient with respect to the logits of the block; added to.
        logits: (r, V) logits of the block.
        labels: (n,) target ids of the tile.
        block: The rows of the block in the tile.
        slopes: (n, 3) `slope` of `segment_divergence` at every token after a first one.
        text: The tile's segments under the student.
        objective: The loss.
    """
    later = text.later_rows
    later = later[(later >= block.start) & (later < block.stop)] - block.start
    if not len(later):
        return
    rows = index_tensor(later, slopes)
    of_text, of_class, log_ratio = slopes[block][rows].to(logits)[:, :, None].unbind(1)
    log_q = torch.log_softmax(elementwise.scaled_logits(logits[rows], objective.temperature), -1)
    log_not = text.log_not[block][rows, None].to(logits)
    at_label = of_text * log_not.exp() - of_class * (log_ratio + log_not).clamp_(max=0).exp()
    found = (log_q + log_ratio).clamp_(max=0).exp_().mul_(of_class)
    found.sub_(log_q.exp_().mul_(of_text))
    found.scatter_(-1, labels[block][rows, None], at_label)
    gradient.index_add_(0, rows, scale_gradient_(found, objective))


def cross_entropy_metrics(
    logits: Tensor, labels: Tensor, objective: Objective, with_gradient: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute the student's own metrics from logits (r, V) and labels (r, 1).

    Returns the metrics by name, (r,) each, and the gradient of the cross-entropy's part of the loss
    with respect to the logits, (r, V), or None.
    """
    log_q = torch.log_softmax(logits, -1)
    q = log_q.exp()
    cross_entropy = -log_q.gather(-1, labels)[:, 0]
    metrics = {
        "cross_entropy": cross_entropy,
        "student_entropy": elementwise.entropy(q, log_q, out=log_q),
    }
    weight = objective.soft_weight
    if not with_gradient:
        return metrics, None
    if weight == 1.0:
        return metrics, q.zero_()
    gradient = q.mul_(1 - weight)
    at_label = torch.full_like(cross_entropy, weight - 1)[:, None]
    return metrics, gradient.scatter_add_(-1, labels, at_label)


def metric_sums(metrics: dict[str, Tensor]) -> Tensor:
    """Sum metrics by name, (tokens or segments,) each, to (len(TOKEN_METRICS),) in float64."""
    cross_entropy = metrics["cross_entropy"]
    zero = torch.zeros((), dtype=torch.float64, device=cross_entropy.device)
    metrics = metrics | {"tokens": torch.ones_like(cross_entropy)}
    return torch.stack(
        [metrics[x].sum(dtype=torch.float64) if x in metrics else zero for x in TOKEN_METRICS]
    )


def teacher_sums(
    teacher: Tensor, labels: Tensor, theirs: SegmentLogProbs, ours: SegmentLogProbs
) -> Tensor:
    """Sum the metrics of the teacher alone, at temperature 1, to (len(TOKEN_METRICS),) in float64.

    `teacher` is (m, V of the teacher) logits, `labels` (m,). Entropy and cross-entropy are those of
    the teacher's own tokens. The probability of a label is the geometric mean per student token of
    a segment.
    """
    cross_entropy = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    entropy = torch.zeros_like(cross_entropy)
    for block in row_blocks(teacher):
        log_p = torch.log_softmax(teacher[block], -1)
        cross_entropy[block] = -log_p.gather(-1, labels[block, None])[:, 0].double()
        entropy[block] = elementwise.entropy(log_p.exp(), log_p, out=log_p).double()
    cumulative = torch.cat([cross_entropy.new_zeros(1), cross_entropy.cumsum(0)])
    of_segment = cumulative[theirs.first + theirs.count] - cumulative[theirs.first]
    probability = ours.count * (-of_segment / ours.count).exp()
    metrics = {"teacher_cross_entropy": cross_entropy, "teacher_entropy": entropy}
    metrics |= {"teacher_label_probability": probability}
    sums = metric_sums(metrics | {"cross_entropy": cross_entropy})
    for name in ("cross_entropy", "tokens"):
        sums[TOKEN_METRICS.index(name)] = 0.0
    return sums
