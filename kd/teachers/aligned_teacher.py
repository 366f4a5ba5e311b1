"""A live teacher with another tokenizer; its tokens are aligned to the student's by bytes."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from kd.data.packing import BOUNDS
from kd.data.vocabularies import SharedVocabulary, VocabularySide
from kd.losses.segments import AlignedTeacherOutputs, TokenClasses
from kd.teachers.live import LiveTeacher

MIN_ALIGNED = 0.1  # share of the target tokens below which a run is refused
EXPECTED_ALIGNED = 0.8  # share below which a note is printed


def check_alignment(aligned: int, targets: int) -> str | None:
    """Return a note if many target tokens cannot be compared with the teacher, otherwise None.

    Raises ValueError if hardly any can.
    """
    share = aligned / max(targets, 1)
    found = f"align_tokenizers: {share:.1%} of the target tokens can be compared with the teacher"
    if share < MIN_ALIGNED:
        raise ValueError(
            f"{found}; wanted at least {MIN_ALIGNED:.0%}. The chat templates render different "
            "texts, or one tokenizer normalizes them: train on the teacher's text instead "
            "(train/generate.py, then train/sft.py)"
        )
    return (
        f"note: {found}; the others have cross-entropy only" if share < EXPECTED_ALIGNED else None
    )


class AlignedTeacher:
    """Runs a live teacher on batches of `kd.data.alignment.AlignedCollator`."""

    def __init__(self, live: LiveTeacher, vocabulary: SharedVocabulary) -> None:
        self.live, self.module = live, live.module
        self.student_classes, self.teacher_classes = (
            token_classes(side, live.device) for side in (vocabulary.student, vocabulary.teacher)
        )

    def outputs(
        self, batches: list[dict], layers: list[int] | None = None
    ) -> Iterator[contextlib.AbstractContextManager[tuple[AlignedTeacherOutputs, list[Tensor]]]]:
        """Yield one context per batch: (hidden states (N, H) with segments, no layer states).

        `layers` must be empty: hidden states cannot be matched across tokenizers.
        """
        assert not layers
        names = ("input_ids", "position_ids", "labels", *BOUNDS)
        theirs = [
            {name: batch[f"teacher_{name}"] for name in names if f"teacher_{name}" in batch}
            for batch in batches
        ]
        contexts = self.live.outputs(theirs)
        for context, batch in zip(contexts, batches, strict=True):
            yield self._aligned(context, batch)

    @contextlib.contextmanager
    def _aligned(
        self, context: contextlib.AbstractContextManager, batch: dict
    ) -> Iterator[tuple[AlignedTeacherOutputs, list[Tensor]]]:
        labels = batch["teacher_labels"]
        with context as (outputs, states):
            yield (
                AlignedTeacherOutputs(
                    outputs.hidden,
                    outputs.head,
                    labels[labels >= 0].to(self.live.device),
                    batch["segments"],
                    batch["teacher_segments"],
                    self.student_classes,
                    self.teacher_classes,
                ),
                states,
            )


def token_classes(side: VocabularySide, device: torch.device) -> TokenClasses:
    """Copy the classes of one vocabulary to a device."""
    class_of, main = (torch.from_numpy(x).to(device) for x in (side.class_of, side.main))
    return TokenClasses.of(class_of, main)
