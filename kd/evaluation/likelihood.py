"""Log-likelihoods of held-out rows, and the agreement of a student with its teacher on them.

B batch, T tokens, N target tokens, V vocabulary, H hidden, R rows, M metrics. All metrics are sums
over the target tokens of one row, so that means over any set of rows, and tests on paired rows, can
be computed from them. Logits exist for one tile of tokens at a time; (B, T, V) is never allocated.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from kd.data.packing import Collator
from kd.distributed import all_sum, rank, share_of
from kd.evaluation.rows import HeldoutRow
from kd.losses.divergences import forward_kl, reverse_kl
from kd.losses.head import Head, TeacherOutputs
from kd.models.heads import backbone_only, head_of, target_positions

TILE = 128  # tokens whose logits exist at the same time
LIKELIHOOD = ("nats",)
AGREEMENT = (
    "cross_entropy",
    "teacher_cross_entropy",
    "forward_kl",  # KL(teacher || student)
    "reverse_kl",  # KL(student || teacher)
    "top1_agreement",  # both models have the same most likely token
    "top5_overlap",  # the teacher's most likely token is among the student's top five
)
# Columns after AGREEMENT: both models' top probability, and whether the top token is the target.
CALIBRATION = ("confidence", "correct", "teacher_confidence", "teacher_correct")
CONFIDENCE_BINS = 10
PLACE_BINS = 24  # bin b: targets 2^b to 2^(b + 1) - 1 of a row, counted from 1


@dataclass(frozen=True)
class Sums:
    """Sums of one model's metrics over target tokens, in float64 on the CPU."""

    rows: Tensor  # (R, M), M are LIKELIHOOD, or with a teacher AGREEMENT
    places: Tensor  # (PLACE_BINS, 1 + M): the number of tokens, then the metrics
    calibration: Tensor  # (2, CONFIDENCE_BINS, 3), student and teacher: count, confidence, correct


@dataclass(frozen=True)
class Batch:
    """One padded batch of windows."""

    rows: list[int]  # index in the list of rows of every window
    inputs: dict[str, Tensor]  # output of the Collator, (B, T) each


@dataclass(frozen=True)
class TeacherStates:
    """Hidden states of one teacher pass over all batches, on the CPU in the teacher's data type."""

    hidden: list[Tensor]  # (N, H) for each batch of this rank
    head: Head


def make_batches(rows: list[HeldoutRow], pad_token_id: int, size: int) -> list[Batch]:
    """Group windows of similar length, longest first, so that running out of memory shows early."""
    windows = [(i, window) for i, row in enumerate(rows) for window in row.windows]
    windows.sort(key=lambda item: -len(item[1]))
    collate = Collator(pad_token_id)
    groups = [windows[i : i + size] for i in range(0, len(windows), size)]
    return [Batch([i for i, _ in g], collate([[window] for _, window in g])) for g in groups]


def exact_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """Return the model's head in float32, or in float64 for a float64 model.

    Raises ValueError if the head has fewer rows than the tokenizer has ids.
    """
    head = head_of(model)
    if len(head.weight) < vocab_size:
        raise ValueError(
            f"{model.name_or_path}: its head has {len(head.weight)} rows and its tokenizer "
            f"{vocab_size} ids; resize the model's embeddings to the tokenizer"
        )
    return head.to(torch.promote_types(head.weight.dtype, torch.float32))


@torch.no_grad()
def teacher_states(
    teacher: PreTrainedModel, batches: list[Batch], vocab_size: int
) -> TeacherStates:
    """Run the teacher once over this rank's share of the batches.

    Raises ValueError if its head has fewer rows than `vocab_size`.
    """
    with as_backbone(teacher):
        hidden = [
            target_hidden(teacher, batch)[0].cpu()
            for batch in tqdm(share_of(batches), desc="teacher", unit="batch", disable=rank() > 0)
        ]
    return TeacherStates(hidden, exact_head(teacher, vocab_size))


@torch.no_grad()
def row_sums(
    model: PreTrainedModel,
    batches: list[Batch],
    vocab_size: int,
    teacher: TeacherStates | None = None,
    description: str = "model",
) -> Sums:
    """Collective: sum the metrics of all target tokens; every rank returns the global sums.

    `batches` are all batches, not this rank's share. Probabilities are over the first `vocab_size`
    ids, so that padded embeddings get none. Raises ValueError if a sum is not finite, or if the
    head has fewer rows than `vocab_size`.
    """
    head = exact_head(model, vocab_size)
    names = AGREEMENT if teacher else LIKELIHOOD
    count = 1 + max(row for batch in batches for row in batch.rows)
    sums = torch.zeros(count, len(names), dtype=torch.float64)
    places = torch.zeros(PLACE_BINS, 1 + len(names), dtype=torch.float64)
    calibration = torch.zeros(2, CONFIDENCE_BINS, 3, dtype=torch.float64)
    mine = share_of(batches)
    for i, batch in enumerate(tqdm(mine, desc=description, unit="batch", disable=rank() > 0)):
        with as_backbone(model):
            hidden, labels, row_of = target_hidden(model, batch)
        outputs = None
        if teacher:
            outputs = TeacherOutputs(teacher.hidden[i].to(hidden.device), teacher.head)
        metrics = token_metrics(hidden, labels, head, vocab_size, outputs).cpu()  # (N, M + 4)
        row_of, shown = row_of.cpu(), metrics[:, : len(names)]
        sums.index_add_(0, torch.tensor(batch.rows)[row_of], shown)
        places.index_add_(0, place_bins(row_of), torch.cat([torch.ones(len(shown), 1), shown], -1))
        pairs = metrics[:, len(names) :].split(2, -1) if teacher else []
        for pair, bins in zip(pairs, calibration, strict=False):
            of_bin = (pair[:, 0] * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
            bins.index_add_(0, of_bin, torch.cat([torch.ones(len(pair), 1), pair], -1))
    found = Sums(all_sum(sums), all_sum(places), all_sum(calibration))
    infinite = int((~found.rows.isfinite()).any(-1).sum())
    if infinite:
        raise ValueError(
            f"{description}: {infinite} of {len(found.rows)} rows have a metric that is not finite "
            f"in {model.dtype}; measure with dtype: float32, or check the training run"
        )
    return found


def place_bins(row_of: Tensor) -> Tensor:
    """Return (N,) the bin of each target's position in its row; `row_of` (N,) is ascending."""
    counts = torch.bincount(row_of)
    first = (counts.cumsum(0) - counts)[row_of]
    place = torch.arange(1, len(row_of) + 1) - first
    return place.double().log2().floor().long().clamp(max=PLACE_BINS - 1)


@contextlib.contextmanager
def as_backbone(model: PreTrainedModel) -> Iterator[None]:
    """Make model(...) return its last hidden states, (B, T, H), inside the context."""
    backbone_only(model)
    try:
        yield
    finally:
        # The replaced forward refers to the model; without this, only the garbage collector would
        # free the model's memory.
        del model.forward


def target_hidden(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (N, H) the hidden states that predict targets, (N,) targets, (N,) their batch rows."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    hidden = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])  # (B, T, H)
    positions, labels = target_positions(inputs["labels"])
    return hidden[positions], labels, positions.nonzero()[:, 0]


def token_metrics(
    hidden: Tensor, labels: Tensor, head: Head, vocab_size: int, teacher: TeacherOutputs | None
) -> Tensor:
    """Return the metrics of every target token in float64, computed tile by tile.

    `hidden` (N, H), `labels` (N,). The result is (N, 1), the cross-entropy; with a teacher it is
    (N, M + 4), the columns AGREEMENT and CALIBRATION.
    """
    tiles = []
    for start in range(0, len(labels), TILE):
        tile = slice(start, start + TILE)
        logits = head.logits(hidden[tile], vocab_size)  # (n, V)
        columns = [cross_entropy(logits, labels[tile], reduction="none")]
        if teacher:
            teacher_logits = teacher.head.logits(teacher.hidden[tile], vocab_size)  # (n, V)
            best = teacher_logits.argmax(-1, keepdim=True)  # (n, 1)
            # By rank, not topk, which would break a tie at the fifth place arbitrarily.
            place = (logits > logits.gather(-1, best)).sum(-1)
            columns += [
                cross_entropy(teacher_logits, labels[tile], reduction="none"),
                forward_kl(teacher_logits, logits),
                reverse_kl(teacher_logits, logits),
                logits.argmax(-1) == best[:, 0],
                place < 5,
                logits.softmax(-1).amax(-1),
                logits.argmax(-1) == labels[tile],
                teacher_logits.softmax(-1).amax(-1),
                best[:, 0] == labels[tile],
            ]
        tiles.append(torch.stack([column.double() for column in columns], -1))
    return torch.cat(tiles)
