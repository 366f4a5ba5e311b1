"""Steps without a finite loss or gradient are named, skipped a few times, and then end the run."""

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

WORDS = 60  # characters of a row that are shown


class NonFinite(TrainerCallback):
    """Says which rows on which rank; `limit` steps in a row are skipped, the next is an error.

    Micro-steps note flags on the device; one number is read at the end of a step. Where DeepSpeed or a
    loss scaler runs they leave out an update with such a gradient themselves; without them it is done here.
    """

    def __init__(self, trainer: Trainer, limit: int):
        self.trainer, self.limit = trainer, limit
        self.noted: list[tuple[Tensor, Tensor]] = []  # ((B, T) ids, is its loss finite)
        self.in_a_row = 0
        self.gradient_left_out = False

    def note(self, ids: Tensor, loss: Tensor) -> None:
        self.noted.append((ids, torch.isfinite(loss.detach())))

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        """Without gradients an optimizer leaves every weight as it is."""
        if self.trainer.is_deepspeed_enabled or args.fp16:
            return
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm([p.grad for p in trained])).sum()
        self.gradient_left_out = not torch.isfinite(norm)
        if self.gradient_left_out:
            for parameter in trained:
                parameter.grad = None

    def bad_batches(self) -> Tensor:
        """Which micro-batches of this step, on this rank, have no finite loss."""
        return ~torch.stack([finite for _, finite in self.noted])  # (micro-steps,)

    def end_step(self, any_bad: bool, args: TrainingArguments, step: int) -> None:
        """`any_bad`: a loss of any rank is not finite."""
        bad, noted, self.noted = self.bad_batches(), self.noted, []
        skipped = self.gradient_left_out or self.trainer.accelerator.optimizer_step_was_skipped
        if not any_bad and (not skipped or args.fp16):  # a loss scale is found by such steps
            self.in_a_row = 0
            return
        self.in_a_row += 1
        for i in bad.nonzero().flatten().tolist():
            print(
                f"{self.where()}step {step}: no finite loss in {self.rows(noted[i][0])}", flush=True
            )
        if not any_bad and args.process_index == 0:
            print(f"step {step}: no finite gradient, although every loss is finite", flush=True)
        if not skipped:
            raise ValueError(self.advice(f"step {step} has no finite loss, and was not left out"))
        if self.in_a_row > self.limit:
            raise ValueError(self.advice(f"{self.in_a_row} steps in a row were not finite"))
        if args.process_index == 0:
            print(f"step {step} is left out ({self.in_a_row} of {self.limit} in a row)", flush=True)

    def where(self) -> str:
        args = self.trainer.args
        return f"[rank {args.process_index}] " if args.world_size > 1 else ""

    def rows(self, batch: Tensor) -> str:
        """The rows of a micro-batch by number and first words; searched for only when it is too late."""
        trainer, found = self.trainer, []
        batch = batch.cpu()
        for ids in batch:
            number = next(
                (n for n in range(len(trainer.train_dataset)) if self.is_row(n, ids)), "?"
            )
            text = trainer.processing_class.decode(ids, skip_special_tokens=True)
            found.append(f"row {number} ({' '.join(text.split())[:WORDS]!r})")
        return ", ".join(found)

    def is_row(self, number: int, ids: Tensor) -> bool:
        trainer = self.trainer
        row = trainer.data_collator([trainer.train_dataset[number]])["input_ids"][0]
        length = min(len(row), len(ids))
        return torch.equal(row[:length], ids[:length])

    def advice(self, what: str) -> str:
        last = f"last checkpoint in {self.trainer.args.output_dir}"
        return (
            f"{what}; the rows are named above. The weights of the {last} are good. Lower "
            "learning_rate, use bf16 or float32 in place of fp16, or take these rows out"
        )
