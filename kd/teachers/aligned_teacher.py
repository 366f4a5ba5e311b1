"""A live teacher with another tokenizer: it reads its own ids, and its targets come in chunks."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from kd.data.vocabularies import SharedVocabulary, Side
from kd.losses.objective import Objective
from kd.losses.segments import AlignedSignal, Classes
from kd.settings.distillation import OWN_BASE, TeacherSettings
from kd.teachers.live import LiveTeacher

LEAST_ALIGNED, ENOUGH = 0.1, 0.8  # of the target tokens


def check_alignable(teacher: TeacherSettings, objective: Objective | None) -> None:
    """Raise ValueError for what a teacher with another tokenizer cannot be asked for."""
    if teacher.teacher_cache:
        raise ValueError(
            "align_tokenizers: true with teacher_cache, which keeps likeliest ids of one vocabulary; "
            "remove one of the two"
        )
    if teacher.teacher == OWN_BASE:
        raise ValueError(
            "align_tokenizers: true with teacher: self, whose tokenizer is the student's; remove it"
        )
    if objective and objective.hidden_weight:
        raise ValueError(
            "align_tokenizers: true with hidden_weight: hidden states of other tokens cannot be "
            "compared; set hidden_weight: 0"
        )


def check_alignment(aligned: int, targets: int) -> str | None:
    """What to say of rows of which little can be compared. Raises ValueError where it is next to
    nothing."""
    share = aligned / max(targets, 1)
    told = f"align_tokenizers: {share:.1%} of the target tokens can be compared with the teacher"
    if share < LEAST_ALIGNED:
        raise ValueError(
            f"{told}; wanted {LEAST_ALIGNED:.0%} or more. The two templates write other texts, or "
            "one tokenizer changes them: train on the teacher's text instead (train/generate.py, "
            "then train/sft.py)"
        )
    return f"note: {told}; the others have cross-entropy alone" if share < ENOUGH else None


class AlignedTeacher:
    """Gives a batch of `kd.data.alignment.AlignedCollator` as the loss takes it."""

    def __init__(self, live: LiveTeacher, vocabulary: SharedVocabulary) -> None:
        self.live, self.module = live, live.module
        self.student_classes, self.teacher_classes = (
            on_device(side, live.device) for side in (vocabulary.student, vocabulary.teacher)
        )

    def signals(
        self, batches: list[dict], layers: list[int] | None = None
    ) -> Iterator[contextlib.AbstractContextManager[tuple[AlignedSignal, list[Tensor]]]]:
        """One context for each batch, as LiveTeacher has them; the teacher runs as often."""
        assert not layers
        names = ("input_ids", "position_ids", "labels")
        theirs = [{name: batch[f"teacher_{name}"] for name in names} for batch in batches]
        contexts = self.live.signals(theirs)
        for context, batch in zip(contexts, batches, strict=True):
            yield self.signal(context, batch)

    @contextlib.contextmanager
    def signal(
        self, context: contextlib.AbstractContextManager, batch: dict
    ) -> Iterator[tuple[AlignedSignal, list[Tensor]]]:
        labels = batch["teacher_labels"]
        with context as (signal, states):
            yield (
                AlignedSignal(
                    signal.hidden,
                    signal.head,
                    labels[labels >= 0].to(self.live.device),
                    batch["chunks"],
                    batch["teacher_chunks"],
                    self.student_classes,
                    self.teacher_classes,
                ),
                states,
            )


def on_device(side: Side, device: torch.device) -> Classes:
    class_of, main = (torch.from_numpy(x).to(device) for x in (side.class_of, side.main))
    return Classes.of(class_of, main)
