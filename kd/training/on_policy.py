"""On-policy distillation: of some rows of a step the student writes the answer itself.

A chosen row keeps its prompt, up to one of its answers; the student's answer takes that one's place,
and its tokens are the row's only targets. A token of the data counts soft_weight * divergence +
(1 - soft_weight) * cross-entropy, one of the student's the divergence alone, so the weights of every
token sum to 1, and the loss is their mean over all target tokens of the step, counted after the
generation. MiniLLM (Gu et al. 2023) and GKD (Agarwal et al. 2023, algorithm 1; its lambda is
student_fraction). No gradient flows through the choice of tokens, as in GKD.

All draws come from seed, step and a row's place in the global batch: there is no state to save, a run
that goes on draws what it would have drawn, and however many ranks there are, they choose the same rows.
"""

import itertools
import random
from collections.abc import Iterable

import torch
from torch import Tensor

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.data.packing import ON_POLICY, Collator, spans
from kd.settings.distillation import DataSettings, OnPolicySettings, TeacherSettings
from kd.training.rollouts import Prompt, Writer
from kd.training.samples import TEXT_TOKENS


def check_on_policy(
    settings: OnPolicySettings, teacher: TeacherSettings, data: DataSettings
) -> None:
    """Raise ValueError where rows of the student's own cannot be had."""
    if not settings.student_fraction:
        return
    share = f"student_fraction: {settings.student_fraction}"
    if teacher.teacher_cache:
        raise ValueError(
            f"{share} with teacher_cache: the cache knows nothing of text that the student has yet "
            "to write; leave teacher_cache out, so that the teacher runs in the step"
        )
    if teacher.align_tokenizers:
        raise ValueError(
            f"{share} with align_tokenizers: text that is not yet written cannot be aligned; train on "
            "the data alone (student_fraction: 0), or take a teacher with the student's tokenizer"
        )
    if data.packing:
        raise ValueError(
            f"{share} with packing: an answer has another length than the one it replaces, and a "
            "packed row has no room for it; set packing: false, and train_sampling_strategy: "
            "group_by_length against padding"
        )


def chosen_places(fraction: float, rows: int, seed: int, step: int) -> set[int]:
    """Places in a global batch of `rows` of the rows that the student answers.

    `fraction` * rows of them, rounded up or down so that it is right on average.
    """
    draws = random.Random(f"{seed} {step}")
    return set(draws.sample(range(rows), int(fraction * rows + draws.random())))


def answer_starts(row: EncodedRow) -> list[int]:
    """Where an answer begins; what stands before is its prompt.

    A text that is all target has none: its beginning is taken for one, at most half of it.
    """
    target = [label != IGNORE_INDEX for label in row.labels]
    starts = [i for i in range(1, len(row)) if target[i] and not target[i - 1]]
    if starts[:1] == [1]:
        end = next((i for i in range(1, len(row)) if not target[i]), len(row))
        starts[0] = min(TEXT_TOKENS, end // 2)
    return starts


def documents(batch: dict[str, Tensor]) -> list[EncodedRow]:
    """The rows of a batch without padding, also where all of them lie in one."""
    found = []
    columns = (batch[key].tolist() for key in ("input_ids", "labels", "position_ids", "tokens"))
    for ids, labels, positions, length in zip(*columns, strict=True):
        bounds = [i for i in range(length) if positions[i] == 0] + [length]
        found += [EncodedRow(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)]
    return found


class StudentRows:
    """Puts the student's answers into the micro-batches of a step."""

    def __init__(
        self,
        settings: OnPolicySettings,
        writer: Writer,
        collator: Collator,
        max_length: int,
    ) -> None:
        self.settings, self.writer, self.collator = settings, writer, collator
        self.max_length = max_length

    def __str__(self) -> str:
        settings = self.settings
        return (
            f"on-policy: the student answers {settings.student_fraction:.0%} of the rows itself, in "
            f"at most {settings.max_new_tokens} tokens; on these the divergence alone"
        )

    def put_into(
        self, batches: list[dict[str, Tensor]], args, step: int
    ) -> tuple[list[dict[str, Tensor]], list[list[int]], int]:
        """(the batches with chosen rows answered, the answers, how many were cut).

        Collective under ZeRO-3: every rank must call it with equally many batches. An answer that is
        cut at max_new_tokens, or at max_length, has no end token, and none is taught behind it.
        """
        micro, ranks = args.per_device_train_batch_size, args.world_size
        rows = micro * ranks * args.gradient_accumulation_steps
        chosen = chosen_places(self.settings.student_fraction, rows, args.seed, step)
        if not chosen:  # on all ranks
            return batches, [], 0
        split: dict[int, list[EncodedRow]] = {}
        prompts: dict[tuple[int, int], Prompt] = {}
        for n, batch in enumerate(batches):
            first = (n * ranks + args.process_index) * micro  # as accelerate deals them out
            if not chosen.isdisjoint(range(first, first + micro)):
                split[n] = documents(batch)
                for i, row in enumerate(split[n]):
                    if first + i in chosen and row.targets:
                        prompts[n, i] = self.prompt(row, f"{args.seed} {step} {first + i}")
        answers = self.writer.answers(list(prompts.values()), args.device)
        for ((n, i), prompt), answer in zip(prompts.items(), answers, strict=True):
            split[n][i] = EncodedRow(prompt.ids + answer, [IGNORE_INDEX] * len(prompt.ids) + answer)
        filled = [
            self.collated(split[n], {i for m, i in prompts if m == n}, args.device)
            if n in split
            else batch | {ON_POLICY: torch.zeros_like(batch["labels"], dtype=torch.bool)}
            for n, batch in enumerate(batches)
        ]
        return filled, answers, sum(answer[-1] not in self.writer.ends for answer in answers)

    def prompt(self, row: EncodedRow, draw: str) -> Prompt:
        """Up to one of the row's answers, each as likely."""
        draws = random.Random(draw)
        start = draws.choice(answer_starts(row))
        limit = min(self.settings.max_new_tokens, self.max_length - start)
        return Prompt(row.input_ids[:start], limit, draws.getrandbits(60))

    def collated(
        self, rows: list[EncodedRow], own: Iterable[int], device: torch.device
    ) -> dict[str, Tensor]:
        batch = self.collator([[row] for row in rows])
        batch[ON_POLICY] = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        places = [(0, start) for start, _, _ in spans(rows)]
        for i in own:
            line, start = places[i] if self.collator.flat else (i, 0)
            batch[ON_POLICY][line, start : start + len(rows[i])] = True
        return {name: tensor.to(device) for name, tensor in batch.items()}
