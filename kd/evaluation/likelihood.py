"""How probable models find held-out rows, and how near their distributions are to a teacher's.

B batch, T tokens, N target tokens, V vocabulary, H hidden, R rows, F figures. All figures are sums
over the target tokens of one row, so that means over any set of rows, and tests on paired rows, can
be made from them. Logits exist for one tile of tokens at a time; (B, T, V) never does.
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
from kd.losses.fused import Head, TeacherSignal
from kd.models.heads import backbone_only, head_of, target_positions

TILE = 128  # tokens whose logits, and what is made of them, exist at one time
LIKELIHOOD = ("nats",)
AGREEMENT = (
    "cross_entropy",
    "teacher_cross_entropy",
    "forward_kl",  # KL(teacher || student)
    "reverse_kl",  # KL(student || teacher)
    "top1_agreement",  # both models' most probable token is the same
    "top5_overlap",  # the teacher's most probable token is among the student's five
)
# Behind AGREEMENT: the largest probability, and whether it is the target's, of both models.
CALIBRATION = ("confidence", "correct", "teacher_confidence", "teacher_correct")
CONFIDENCE_BINS = 10
PLACE_BINS = 24  # bin b: the targets 2^b to 2^(b + 1) - 1 of a row, counted from 1


@dataclass(frozen=True)
class Sums:
    """Of one model over target tokens, in float64 on the CPU."""

    rows: Tensor  # (R, F), F are LIKELIHOOD, or with a teacher AGREEMENT
    places: Tensor  # (PLACE_BINS, 1 + F): the number of tokens, then the figures
    calibration: Tensor  # (2, CONFIDENCE_BINS, 3) of student, teacher: number, confidence, correct


@dataclass(frozen=True)
class Batch:
    rows: list[int]  # of every line of the batch its place in the list of rows
    inputs: dict[str, Tensor]  # of the Collator, (B, T) each


@dataclass(frozen=True)
class TeacherStates:
    """One teacher forward over all batches, kept on the CPU: N * H numbers of its own type."""

    hidden: list[Tensor]  # (N, H of the teacher) of each batch of this process
    head: Head


def make_batches(rows: list[HeldoutRow], pad_token_id: int, size: int) -> list[Batch]:
    """Windows of like length together, the longest first: what does not fit fails at once."""
    windows = [(i, window) for i, row in enumerate(rows) for window in row.windows]
    windows.sort(key=lambda item: -len(item[1]))
    collate = Collator(pad_token_id)
    groups = [windows[i : i + size] for i in range(0, len(windows), size)]
    return [Batch([i for i, _ in g], collate([[window] for _, window in g])) for g in groups]


def exact_head(model: PreTrainedModel, vocabulary: int) -> Head:
    """The model's head in float32, or in float64 where the model is.

    Raises ValueError where it has fewer rows than the tokenizer has ids.
    """
    head = head_of(model)
    if len(head.weight) < vocabulary:
        raise ValueError(
            f"{model.name_or_path}: its head has {len(head.weight)} rows and its tokenizer "
            f"{vocabulary} ids; resize the model's embeddings to the tokenizer"
        )
    return head.to(torch.promote_types(head.weight.dtype, torch.float32))


@torch.no_grad()
def teacher_states(
    teacher: PreTrainedModel, batches: list[Batch], vocabulary: int
) -> TeacherStates:
    """Run the teacher once over this process's share of the batches."""
    with as_backbone(teacher):
        hidden = [
            target_hidden(teacher, batch)[0].cpu()
            for batch in tqdm(share_of(batches), desc="teacher", unit="batch", disable=rank() > 0)
        ]
    return TeacherStates(hidden, exact_head(teacher, vocabulary))


@torch.no_grad()
def row_sums(
    model: PreTrainedModel,
    batches: list[Batch],
    vocabulary: int,
    teacher: TeacherStates | None = None,
    description: str = "model",
) -> Sums:
    """Sums over target tokens, of all processes in each; `batches` are all, not a share.

    Probabilities are over the first `vocabulary` ids: padding of the embeddings gets none.
    Raises ValueError where a sum is not finite.
    """
    head = exact_head(model, vocabulary)
    names = AGREEMENT if teacher else LIKELIHOOD
    count = 1 + max(row for batch in batches for row in batch.rows)
    sums = torch.zeros(count, len(names), dtype=torch.float64)
    places = torch.zeros(PLACE_BINS, 1 + len(names), dtype=torch.float64)
    calibration = torch.zeros(2, CONFIDENCE_BINS, 3, dtype=torch.float64)
    mine = share_of(batches)
    for i, batch in enumerate(tqdm(mine, desc=description, unit="batch", disable=rank() > 0)):
        with as_backbone(model):
            hidden, labels, row_of = target_hidden(model, batch)
        signal = None
        if teacher:
            signal = TeacherSignal(teacher.hidden[i].to(hidden.device), teacher.head)
        figures = token_figures(hidden, labels, head, vocabulary, signal).cpu()  # (N, F + 4)
        row_of, shown = row_of.cpu(), figures[:, : len(names)]
        sums.index_add_(0, torch.tensor(batch.rows)[row_of], shown)
        places.index_add_(0, place_bins(row_of), torch.cat([torch.ones(len(shown), 1), shown], -1))
        pairs = figures[:, len(names) :].split(2, -1) if teacher else []
        for pair, bins in zip(pairs, calibration, strict=False):
            of_bin = (pair[:, 0] * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
            bins.index_add_(0, of_bin, torch.cat([torch.ones(len(pair), 1), pair], -1))
    found = Sums(all_sum(sums), all_sum(places), all_sum(calibration))
    if not found.rows.isfinite().all():
        raise ValueError(
            f"{description}: {int((~sums.isfinite()).any(-1).sum())} of {len(sums)} rows are not "
            f"finite in {model.dtype}; measure in dtype: float32, or look at its training"
        )
    return found


def place_bins(row_of: Tensor) -> Tensor:
    """(N,) the bin of each target's place among the targets of its row; `row_of` is ascending."""
    counts = torch.bincount(row_of)
    first = (counts.cumsum(0) - counts)[row_of]
    place = torch.arange(1, len(row_of) + 1) - first
    return place.double().log2().floor().long().clamp(max=PLACE_BINS - 1)


@contextlib.contextmanager
def as_backbone(model: PreTrainedModel) -> Iterator[None]:
    """Inside, model(...) returns its last hidden states, (B, T, H)."""
    backbone_only(model)
    try:
        yield
    finally:
        # It refers to the model, whose memory would wait for a garbage collection.
        del model.forward


def target_hidden(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H) hidden states that predict targets, (N,) the targets, (N,) their row in the batch."""
    inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    hidden = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])  # (B, T, H)
    positions, labels = target_positions(inputs["labels"])
    return hidden[positions], labels, positions.nonzero()[:, 0]


def token_figures(
    hidden: Tensor, labels: Tensor, head: Head, vocabulary: int, teacher: TeacherSignal | None
) -> Tensor:
    """(N, F) in float64, tile by tile; with a teacher (N, F + 4), AGREEMENT and CALIBRATION."""
    tiles = []
    for start in range(0, len(labels), TILE):
        tile = slice(start, start + TILE)
        logits = head.logits(hidden[tile], vocabulary)  # (n, V)
        columns = [cross_entropy(logits, labels[tile], reduction="none")]
        if teacher:
            teacher_logits = teacher.head.logits(teacher.hidden[tile], vocabulary)  # (n, V)
            best = teacher_logits.argmax(-1, keepdim=True)  # (n, 1)
            # By rank, not topk: a tie at the fifth place would be broken at random.
            rank = (logits > logits.gather(-1, best)).sum(-1)
            columns += [
                cross_entropy(teacher_logits, labels[tile], reduction="none"),
                forward_kl(teacher_logits, logits),
                reverse_kl(teacher_logits, logits),
                logits.argmax(-1) == best[:, 0],
                rank < 5,
                logits.softmax(-1).amax(-1),
                logits.argmax(-1) == labels[tile],
                teacher_logits.softmax(-1).amax(-1),
                best[:, 0] == labels[tile],
            ]
        tiles.append(torch.stack([column.double() for column in columns], -1))
    return torch.cat(tiles)
