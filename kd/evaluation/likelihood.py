"""How probable models find held-out rows, and how near their distributions are to a teacher's.

B batch, T tokens, N target tokens, V vocabulary, H hidden, R rows. All figures are sums over the
target tokens of one row, so that means over any set of rows, and tests on paired rows, can be made
from them. Logits exist for one tile of tokens at a time; (B, T, V) never does.
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
from kd.evaluation.rows import HeldoutRow
from kd.losses.divergences import forward_kl, reverse_kl
from kd.losses.fused import TILE, Head, TeacherSignal
from kd.models.heads import backbone_only, head_of, target_positions

LIKELIHOOD = ("nats",)
AGREEMENT = (
    "cross_entropy",
    "teacher_cross_entropy",
    "forward_kl",  # KL(teacher || student)
    "reverse_kl",  # KL(student || teacher)
    "top1_agreement",  # both models' most probable token is the same
    "top5_overlap",  # the teacher's most probable token is among the student's five
)


@dataclass(frozen=True)
class Batch:
    rows: list[int]  # places in the list of rows
    inputs: dict[str, Tensor]  # of the Collator, (B, T) each


@dataclass(frozen=True)
class TeacherStates:
    """One teacher forward over all batches, kept on the CPU: N * H numbers of its own type."""

    hidden: list[Tensor]  # (N, H of the teacher) of each batch
    head: Head


def make_batches(rows: list[HeldoutRow], pad_token_id: int, size: int) -> list[Batch]:
    """Rows of like length together, the longest first: what does not fit fails at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].encoded))
    collate = Collator(pad_token_id)
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [Batch(group, collate([[rows[i].encoded] for i in group])) for group in groups]


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
    """Run the teacher once over all batches."""
    with as_backbone(teacher):
        hidden = [
            target_hidden(teacher, batch)[0].cpu()
            for batch in tqdm(batches, desc="teacher", unit="batch")
        ]
    return TeacherStates(hidden, exact_head(teacher, vocabulary))


@torch.no_grad()
def row_sums(
    model: PreTrainedModel,
    batches: list[Batch],
    vocabulary: int,
    teacher: TeacherStates | None = None,
    description: str = "model",
) -> Tensor:
    """Sums over every row's target tokens, (R, F) in float64 on the CPU.

    F are LIKELIHOOD, or with a teacher AGREEMENT. Probabilities are over the first `vocabulary`
    ids: padding of the embeddings gets none.
    Raises ValueError where a sum is not finite.
    """
    head = exact_head(model, vocabulary)
    names = AGREEMENT if teacher else LIKELIHOOD
    sums = torch.zeros(sum(len(batch.rows) for batch in batches), len(names), dtype=torch.float64)
    for i, batch in enumerate(tqdm(batches, desc=description, unit="batch")):
        with as_backbone(model):
            hidden, labels, row_of = target_hidden(model, batch)
        signal = None
        if teacher:
            signal = TeacherSignal(teacher.hidden[i].to(hidden.device), teacher.head)
        figures = token_figures(hidden, labels, head, vocabulary, signal)  # (N, F)
        sums.index_add_(0, torch.tensor(batch.rows)[row_of.cpu()], figures.cpu())
    if not sums.isfinite().all():
        raise ValueError(
            f"{description}: {int((~sums.isfinite()).any(-1).sum())} of {len(sums)} rows are not "
            f"finite in {hidden.dtype}; measure in dtype: float32, or look at its training"
        )
    return sums


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
    """(N, F) in float64, tile by tile; F as in `row_sums`."""
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
            ]
        tiles.append(torch.stack([column.double() for column in columns], -1))
    return torch.cat(tiles)
