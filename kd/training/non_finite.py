"""Handle steps without a finite loss or gradient: name their rows, skip a few, then end the run."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kd.distributed import all_gather, barrier, print_rank0, rank_prefix
from kd.training.checkpoints.checkpoint import newest_name

SHOWN_CHARACTERS = 60  # of a row that is named
NAMED = "; the rows are named above"


class NonFinite(TrainerCallback):
    """Skip at most `limit` non-finite steps in a row, and report the rows and the rank.

    Micro-steps store flags on the device; one number is read at the end of a step. DeepSpeed and
    fp16 loss scalers skip a non-finite update themselves; otherwise it is skipped here. A scaler
    also skips updates to find its scale. These do not count as long as it can halve the scale.
    """

    def __init__(self, trainer: Trainer, limit: int):
        self.trainer, self.limit = trainer, limit
        self.noted: list[tuple[Tensor, Tensor]] = []  # ((B, T) ids, whether the loss is finite)
        self.in_a_row = 0
        self.update_skipped = False
        self.scale: float | None = None  # the loss scale after an overflow, until a good step

    def on_train_begin(self, args, state, control, **_) -> None:
        """Collective: raise ValueError for a NaN or an infinity in a weight to be trained."""
        engine = self.trainer.deepspeed if args.fp16 else None
        if engine and engine.zero_optimization():
            # It would end the run with an exception of its own; end_step does it with advice.
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        name = non_finite_weight(self.trainer.model)
        if name:
            raise ValueError(
                f"{name} has values that are NaN or infinite before the first step; wanted a model "
                "with finite weights"
            )

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
        """Collective: report a non-finite step.

        `any_bad` says whether a loss of any rank is not finite. Raises ValueError if the update was
        not skipped, after more than `limit` skipped steps in a row, and if a gradient overflows
        float16 without any loss scale.
        """
        bad, noted, self.noted = self.bad_batches(), self.noted, []
        skipped = self.update_skipped or self.trainer.accelerator.optimizer_step_was_skipped
        if not any_bad and skipped and args.fp16:
            self.report_overflow(args, step)
            return
        self.scale = None
        if not any_bad and not skipped:
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
        barrier()  # no rank may end the run before the others have named their rows
        if not skipped:
            raise ValueError(
                self.with_advice(
                    f"the loss of step {step} is not finite, and it was not skipped{NAMED}"
                )
            )
        if self.in_a_row > self.limit:
            raise ValueError(
                self.with_advice(f"{self.in_a_row} steps in a row were not finite{NAMED}")
            )
        if args.process_index == 0:
            print(f"step {step} is skipped ({self.in_a_row} of {self.limit} in a row)", flush=True)

    def report_overflow(self, args: TrainingArguments, step: int) -> None:
        """Report a step that the loss scaler has skipped, although every loss is finite.

        Raises ValueError if a scale of 1 did not help; each overflow halves it.
        """
        before, self.scale = self.scale, self.loss_scale()
        if before is not None and before <= 1:
            raise ValueError(
                self.with_advice(
                    f"the gradient of step {step} overflows float16 even with a loss scale of 1"
                )
            )
        if args.process_index == 0:
            print(
                f"step {step}: the gradient overflows float16, so its update is skipped; the loss "
                f"scale is now {self.scale:,.0f}",
                flush=True,
            )

    def loss_scale(self) -> float:
        """The loss scale of a run in float16."""
        if self.trainer.is_deepspeed_enabled:
            return self.trainer.deepspeed.optimizer.loss_scale
        return self.trainer.accelerator.scaler.get_scale()

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

    def allows_checkpoint(self) -> bool:
        """Collective: whether the last step was finite; only such a step is saved.

        A run that resumed between skipped steps would not know how many there were. Raises
        ValueError if a trained weight is not finite.
        """
        if self.in_a_row:
            print_rank0(f"step {self.trainer.state.global_step} is not saved: it is not finite")
            return False
        self.check_weights()
        return True

    def check_end(self) -> None:
        """Collective: raise ValueError if the run ended in skipped steps or its weights are bad."""
        if self.in_a_row:
            raise ValueError(
                self.with_advice(
                    f"the run has failed: its last {self.in_a_row} steps were not finite{NAMED}"
                )
            )
        self.check_weights()

    def check_weights(self) -> None:
        """Collective: raise ValueError if a trained weight is not finite."""
        name = non_finite_weight(self.trainer.model)
        if name:
            problem = f"the run has failed: {name} has values that are NaN or infinite"
            raise ValueError(self.with_advice(problem))

    def with_advice(self, problem: str) -> str:
        """The text of an error: the problem, what is still good, and remedies."""
        output_dir = self.trainer.args.output_dir
        return (
            f"{problem}. The last good checkpoint in {output_dir}: "
            f"{newest_name(Path(output_dir))}. Lower learning_rate, set precision: bfloat16 or "
            "float32 instead of float16, or remove these rows"
        )


@torch.no_grad()
def non_finite_weight(model: nn.Module) -> str | None:
    """Collective: the name of a trained weight with a NaN or an infinity; None if all are finite.

    Each rank reads only its own part of weights that ZeRO-3 shards.
    """
    trained = {name: own_part(p) for name, p in model.named_parameters() if p.requires_grad}
    # aminmax needs no temporary tensor, and NaN wins in it.
    ends = [torch.stack(part.aminmax()).float().cpu() for part in trained.values() if len(part)]
    names = [name for name, part in trained.items() if len(part)]
    bad = [name for name, pair in zip(names, ends, strict=True) if not pair.isfinite().all()]
    return next((name for name in all_gather(bad[0] if bad else None) if name), None)


def own_part(parameter: nn.Parameter) -> Tensor:
    """(n,): the values of a weight that this rank holds; all of them unless ZeRO-3 shards it."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach().flatten()
    start = shard.numel() * dist.get_rank(parameter.ds_process_group)
    return shard.flatten()[: max(0, parameter.ds_numel - start)]  # the rest is padding
