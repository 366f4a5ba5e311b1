"""On-policy distillation: the student generates the answers of some rows of every step.

A chosen row keeps its prompt, up to one of its answers. The student's completion replaces that
answer, and its tokens are the row's only targets. A data token contributes soft_weight * divergence
+ (1 - soft_weight) * cross-entropy to the loss, an on-policy token the divergence alone. So the
weights of every token sum to 1, and the loss is their mean over all target tokens of the step,
counted after the generation. See MiniLLM (Gu et al. 2023) and GKD (Agarwal et al. 2023, algorithm
1; its lambda is student_fraction). As in GKD, no gradient flows through the sampling of tokens.

Every random choice depends only on the seed, the step and the row's place in the global batch. So
there is no state to save, a resumed run makes the same choices, and they do not depend on the
number of ranks.
"""

import itertools
import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import TrainingArguments

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.data.packing import ON_POLICY, Collator, document_spans, to_device
from kd.settings.distillation import OnPolicySettings
from kd.training.rollouts import Prompt, RolloutGenerator
from kd.training.samples import TEXT_TOKENS


def choose_rows(fraction: float, rows: int, seed: int, step: int) -> set[int]:
    """Places, in a global batch of `rows`, of the rows that the student answers.

    Their number is `fraction` * rows, rounded up or down at random so that its mean is exact.
    """
    draws = random.Random(f"{seed} {step}")
    return set(draws.sample(range(rows), int(fraction * rows + draws.random())))


def answer_starts(row: EncodedRow) -> list[int]:
    """The first position of every answer of a row; the tokens before it are its prompt.

    Plain text, in which every token is a target, has no prompt: its first TEXT_TOKENS tokens are
    taken as one, at most half of the text.
    """
    target = row.target_mask.tolist()
    starts = [i for i in range(1, len(row)) if target[i] and not target[i - 1]]
    if starts[:1] == [1]:
        end = next((i for i in range(1, len(row)) if not target[i]), len(row))
        starts[0] = min(TEXT_TOKENS, end // 2)
    return starts


def split_documents(batch: dict[str, Tensor]) -> list[EncodedRow]:
    """The documents of a batch of (B, T) tensors, without padding.

    A flat batch holds all documents in one row.
    """
    found = []
    keys = ("input_ids", "labels", "position_ids")
    for i, length in enumerate(batch["tokens"].tolist()):
        ids, labels, positions = (batch[key][i, :length].cpu().numpy() for key in keys)
        bounds = [*np.flatnonzero(positions == 0).tolist(), length]
        found += [
            EncodedRow.from_labels(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(bounds)
        ]
    return found


class OnPolicyRows:
    """Replace answers in the micro-batches of a step with the student's own completions."""

    def __init__(
        self,
        settings: OnPolicySettings,
        generator: RolloutGenerator,
        collator: Collator,
        max_length: int,
    ) -> None:
        self.settings, self.generator, self.collator = settings, generator, collator
        self.max_length = max_length

    def __str__(self) -> str:
        settings = self.settings
        return (
            f"on-policy: the student answers {settings.student_fraction:.0%} of the rows, with at "
            f"most {settings.max_new_tokens} tokens each; their loss is the divergence alone"
        )

    def replace_answers(
        self, batches: list[dict[str, Tensor]], args: TrainingArguments, step: int
    ) -> tuple[list[dict[str, Tensor]], list[list[int]], int]:
        """(the micro-batches with chosen rows replaced, the completions, how many were cut).

        A completion that is cut at max_new_tokens or max_length has no end token, and the student
        is not trained to produce one there. Collective under ZeRO-3: every rank calls it with
        equally many batches.
        """
        micro, ranks = args.per_device_train_batch_size, args.world_size
        rows = micro * ranks * args.gradient_accumulation_steps
        chosen = choose_rows(self.settings.student_fraction, rows, args.seed, step)
        if not chosen:  # on all ranks alike
            return batches, [], 0
        split: dict[int, list[EncodedRow]] = {}
        prompts: dict[tuple[int, int], Prompt] = {}  # by (micro-batch, row)
        for n, batch in enumerate(batches):
            first = (n * ranks + args.process_index) * micro  # the order in which accelerate deals
            if not chosen.isdisjoint(range(first, first + micro)):
                split[n] = split_documents(batch)
                for i, row in enumerate(split[n]):
                    if first + i in chosen and row.targets:
                        prompts[n, i] = self.make_prompt(row, f"{args.seed} {step} {first + i}")
        completions = self.generator.generate(list(prompts.values()), args.device)
        for ((n, i), prompt), completion in zip(prompts.items(), completions, strict=True):
            labels = [IGNORE_INDEX] * len(prompt.ids) + completion
            split[n][i] = EncodedRow.from_labels(prompt.ids + completion, labels)
        filled = [
            self.collate(split[n], {i for m, i in prompts if m == n}, args.device)
            if n in split
            else batch | {ON_POLICY: torch.zeros_like(batch["labels"], dtype=torch.bool)}
            for n, batch in enumerate(batches)
        ]
        cut = sum(completion[-1] not in self.generator.ends for completion in completions)
        return filled, completions, cut

    def make_prompt(self, row: EncodedRow, seed: str) -> Prompt:
        """The tokens before one of the row's answers, chosen uniformly."""
        draws = random.Random(seed)
        start = draws.choice(answer_starts(row))
        limit = min(self.settings.max_new_tokens, self.max_length - start)
        return Prompt(row.input_ids[:start].tolist(), limit, draws.getrandbits(60))

    def collate(
        self, rows: list[EncodedRow], on_policy: Iterable[int], device: torch.device
    ) -> dict[str, Tensor]:
        """A batch of rows with one more tensor, ON_POLICY (B, T): true in the rows `on_policy`."""
        batch = self.collator([[row] for row in rows])
        batch[ON_POLICY] = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
        places = [(0, start) for start, _, _ in document_spans(rows)]
        for i in on_policy:
            line, start = places[i] if self.collator.flat else (i, 0)
            batch[ON_POLICY][line, start : start + len(rows[i])] = True
        return to_device(batch, device)
