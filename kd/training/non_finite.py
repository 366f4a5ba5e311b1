"""Handle steps without a finite loss or gradient: name their rows, skip a few, then end the run."""

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd.distributed import rank_prefix

SHOWN_CHARACTERS = 60  # of a row that is named


class NonFinite(TrainerCallback):
    """Skip at most `limit` non-finite steps in a row, and report the rows and the rank.

    Micro-steps store flags on the device; one number is read at the end of a step. DeepSpeed and
    fp16 loss scalers skip a non-finite update themselves; otherwise it is skipped here.
    """

    def __init__(self, trainer: Trainer, limit: int):
        self.trainer, self.limit = trainer, limit
        self.noted: list[tuple[Tensor, Tensor]] = []  # ((B, T) ids, whether the loss is finite)
        self.in_a_row = 0
        self.update_skipped = False

    def note(self, ids: Tensor, loss: Tensor) -> None:
        """Record on the device whether the scalar loss of a micro-batch, (B, T) ids, is finite."""
        self.noted.append((ids, torch.isfinite(loss.detach())))

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        """Drop non-finite gradients: without gradients an optimizer changes no weight."""
        if self.trainer.is_deepspeed_enabled or args.fp16:
            return
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm([p.grad for p in trained])).sum()
        self.update_skipped = not torch.isfinite(norm)
        if self.update_skipped:
            for parameter in trained:
                parameter.grad = None

    def bad_batches(self) -> Tensor:
        """(micro-steps,) bool: which micro-batches of this rank's step have a non-finite loss."""
        return ~torch.stack([finite for _, finite in self.noted])

    def end_step(self, any_bad: bool, args: TrainingArguments, step: int) -> None:
        """Report a non-finite step; `any_bad` says whether a loss of any rank is not finite.

        Raises ValueError if the update was not skipped, or after more than `limit` skipped steps in
        a row.
        """
        bad, noted, self.noted = self.bad_batches(), self.noted, []
        skipped = self.update_skipped or self.trainer.accelerator.optimizer_step_was_skipped
        # A loss scaler finds its scale by skipping steps whose losses are finite.
        if not any_bad and (not skipped or args.fp16):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        for i in bad.nonzero().flatten().tolist():
            rows = self.describe_rows(noted[i][0])
            print(f"{rank_prefix()}step {step}: the loss is not finite in {rows}", flush=True)
        if not any_bad and args.process_index == 0:
            print(
                f"step {step}: the gradient is not finite, although every loss is finite",
                flush=True,
            )
        if not skipped:
            raise ValueError(
                self.with_advice(f"the loss of step {step} is not finite, and it was not skipped")
            )
        if self.in_a_row > self.limit:
            raise ValueError(self.with_advice(f"{self.in_a_row} steps in a row were not finite"))
        if args.process_index == 0:
            print(f"step {step} is skipped ({self.in_a_row} of {self.limit} in a row)", flush=True)

    def describe_rows(self, batch: Tensor) -> str:
        """The rows of a (B, T) micro-batch by number and first words.

        Searches the whole data set, which is slow but happens only in a failing step.
        """
        trainer, found = self.trainer, []
        batch = batch.cpu()
        for ids in batch:
            number = next(
                (n for n in range(len(trainer.train_dataset)) if self.is_row(n, ids)), "?"
            )
            text = trainer.processing_class.decode(ids, skip_special_tokens=True)
            found.append(f"row {number} ({' '.join(text.split())[:SHOWN_CHARACTERS]!r})")
        return ", ".join(found)

    def is_row(self, number: int, ids: Tensor) -> bool:
        """Whether training row `number` has these (T,) ids, up to padding."""
        trainer = self.trainer
        row = trainer.data_collator([trainer.train_dataset[number]])["input_ids"][0]
        length = min(len(row), len(ids))
        return torch.equal(row[:length], ids[:length])

    def with_advice(self, problem: str) -> str:
        """The text of an error: the problem, what is still good, and remedies."""
        return (
            f"{problem}; the rows are named above. The last checkpoint in "
            f"{self.trainer.args.output_dir} is good. Lower learning_rate, use bf16 or float32 "
            "instead of fp16, or remove these rows"
        )
