"""SFT and distillation on Transformers' Trainer: one class, since they differ only in the loss.

The loss of a micro-batch is the SUM over its target tokens. DDP and DeepSpeed average gradients
over processes, so the loss is multiplied by world size / target tokens of the whole step, here and
nowhere else. B batch, T tokens.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer

from kd.data.encoding import EncodedRow
from kd.data.packing import (
    ON_POLICY,
    FilledUp,
    FilledUpOrder,
    GroupedByLength,
    bounds_of,
    by_length,
)
from kd.data.workers import Workers
from kd.distributed import all_sum
from kd.losses.hidden import PROJECTIONS, HiddenObjective
from kd.losses.metrics import REPORTED, shown_metrics
from kd.models.heads import LossInputs, causal_lm, return_loss
from kd.planning.throughput import MatrixWork
from kd.run.signals import StopsOnSignal
from kd.settings.distillation import Objective
from kd.teachers.aligned_teacher import AlignedTeacher
from kd.teachers.cached import CachedTeacher
from kd.teachers.live import LiveTeacher
from kd.training.checkpoints.checkpoint import write_checkpoint
from kd.training.console import Console
from kd.training.non_finite import NonFinite
from kd.training.on_policy import OnPolicyRows
from kd.training.rank_sync import RankSync
from kd.training.samples import Samples
from kd.training.step_metrics import StepMetrics, means_over_tokens
from kd.training.stragglers import StragglerMonitor
from kd.training.watchdog import Watchdog


class DistillationTrainer(Trainer):
    """A Trainer whose loss is `objective`; without a teacher, plain SFT.

    `vocab_size` is the tokenizer's, without the head's padding; `run_identity` goes into the
    manifest of every checkpoint; `work` is described at StepMetrics.
    """

    def __init__(
        self,
        *args,
        objective: Objective,
        vocab_size: int,
        teacher: LiveTeacher | CachedTeacher | AlignedTeacher | None = None,
        hidden: HiddenObjective | None = None,
        run_identity: dict[str, Any] | None = None,
        work: MatrixWork | None = None,
        on_policy_rows: OnPolicyRows | None = None,
        **kw,
    ):
        super().__init__(*args, **kw)
        parts = 0 < objective.soft_weight < 1 or hidden is not None
        self.console = Console.instead_of_theirs(self, parts)
        self.run_identity = run_identity or {}
        self.objective = objective
        self.hidden = hidden
        self.vocab_size = vocab_size
        self.teacher = teacher
        self.on_policy_rows = on_policy_rows
        self.teacher_outputs: Iterator = iter(())  # one item per micro-batch still to come
        # Otherwise Trainer divides by the accumulation steps, in addition to the token count.
        self.model_accepts_loss_kwargs = True
        return_loss(causal_lm(self.model))
        shown = shown_metrics(teacher is not None, hidden is not None)
        self.metrics = StepMetrics(self.args.device, shown, work)
        self.times = self.metrics.times
        self.times.watch(causal_lm(self.model).get_output_embeddings(), "loss")
        self.samples = Samples(
            self, teacher, vocab_size, self.args.sample_prompts, self.args.sample_tokens
        )
        self.first_batch = True
        self.stop, self.watchdog = StopsOnSignal(), Watchdog()
        self.non_finite = NonFinite(self, self.args.max_skipped_steps)
        for callback in (
            self.watchdog,
            StragglerMonitor(self.metrics),
            self.non_finite,
            self.stop,
            RankSync(self.non_finite, self.stop),
            self.times,
        ):
            self.add_callback(callback)

    def train(self, *args, **kw):
        """Train as Trainer does; however it ends, nothing goes on watching this process.

        Trainer leaves on_train_end out after an error, and the watchdog would end a notebook later.
        """
        try:
            return super().train(*args, **kw)
        finally:
            for callback in (self.watchdog, self.stop):
                callback.on_train_end(self.args, self.state, self.control)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """(the micro-batches of a step, its number of target tokens); prepares the teacher."""
        self.times.begin_step()
        with self.times.phase("data"):
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.on_policy_rows:  # chosen by their places, so before by_length changes those
            batches = self.with_on_policy_rows(batches)
            items = self._get_num_items_in_batch(batches, device)
        with self.times.phase("data"):
            batches = by_length(batches)
        self.teacher_outputs = self.teacher_outputs_of(batches)
        return batches, items

    def with_on_policy_rows(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches, some of whose answers the current student has generated."""
        self.watchdog.beat()
        with self.times.phase("generation"), self.accelerator.autocast():
            batches, completions, cut = self.on_policy_rows.replace_answers(
                batches, self.args, self.state.global_step
            )
        self.metrics.add_completions(completions, cut)
        self.watchdog.beat()
        return batches

    def teacher_outputs_of(self, batches: list[dict[str, Tensor]]) -> Iterator:
        """One context per batch, in order, that yields (teacher outputs, hidden states)."""
        if self.teacher is None:
            return itertools.repeat(contextlib.nullcontext((None, None)))
        layers = [theirs for _, theirs in self.hidden.layers] if self.hidden else []
        return self.teacher.outputs(batches, layers)

    def training_step(self, *args, **kw):
        """Trainer's, timed: what is neither forward nor optimizer counts as backward."""
        with self.times.phase("backward"):
            return super().training_step(*args, **kw)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The scalar training loss of a micro-batch, normalised; metrics stay on the device."""
        with self.times.phase("teacher"):
            teacher_outputs = next(self.teacher_outputs)
        outputs = self.run_student(model, inputs, teacher_outputs)
        if self.first_batch:
            if self.is_deepspeed_enabled:
                self.times.watch_optimizer(model)
            self.check_first_batch(outputs["metrics"])
        self.metrics.add(outputs["metrics"], inputs)
        self.non_finite.note(inputs["input_ids"], outputs["loss"])
        loss = outputs["loss"] * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def check_first_batch(self, metrics: Tensor) -> None:
        """Raise ValueError if a sum of `metrics` (number of METRICS,) is not finite.

        The model has overflowed then, and a loss scaler would silently skip every step.
        """
        self.first_batch = False
        values = dict(zip(REPORTED, metrics.tolist(), strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            whose = "teacher" if "teacher_cross_entropy" in broken else "student"
            raise ValueError(
                f"the first batch has non-finite {', '.join(broken)}: check the {whose}. In "
                "float16, activations beyond 65504 overflow (those of some Qwen2 models do): set "
                "precision: bfloat16 if the hardware supports it, or float32"
            )

    def run_student(
        self,
        model: torch.nn.Module,
        batch: dict[str, Tensor],
        teacher_outputs: contextlib.AbstractContextManager,
    ) -> dict[str, Tensor]:
        """Call the wrapped student on one micro-batch of (B, T) tensors.

        Returns {"loss": sum over target tokens, "metrics": sums in the order of REPORTED}.
        """
        self.watchdog.beat()
        with teacher_outputs as (teacher, states), self.times.phase("student"):
            return model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                **bounds_of(batch),
                loss_inputs=LossInputs(
                    batch["labels"],
                    self.objective,
                    self.vocab_size,
                    teacher,
                    self.hidden,
                    states,
                    batch.get(ON_POLICY),
                ),
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log Trainer's metrics and ours, which cover all ranks and the time since the last log."""
        if "loss" in logs:  # the only moment at which values are read from the device
            logs.update(self.metrics.read())
            self._tr_loss.zero_()  # Trainer subtracts it from itself, which would keep a NaN
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Means over all held-out target tokens; Trainer's own is a mean over batches."""
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(len(REPORTED), dtype=torch.float64, device=self.args.device)
        quiet = not self.is_world_process_zero() or self.args.disable_tqdm
        batches = self.heldout_batches(eval_dataset)
        teacher_outputs = self.teacher_outputs_of(batches)
        self.console.close_bar()
        for batch in tqdm(batches, desc="held-out rows", leave=False, disable=quiet):
            inputs = self._prepare_inputs(batch)
            sums += self.run_student(model, inputs, next(teacher_outputs))["metrics"]
        means = means_over_tokens(all_sum(sums), self.metrics.shown)
        means["loss"] = self.objective.total(means.get("divergence", 0.0), means["cross_entropy"])
        if self.hidden:
            means["loss"] += self.hidden.weight * means["hidden"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.samples.log()
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _get_train_sampler(self, train_dataset: FilledUp) -> FilledUpOrder:
        """An order of the rows that depends on seed and epoch alone, and not on the ranks."""
        args, rows = self.args, train_dataset.rows
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.train_sampling_strategy == "group_by_length":
            step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            order = GroupedByLength(step, rows.lengths, seed)
        elif args.train_sampling_strategy == "random":
            order = SeedableRandomSampler(rows, data_seed=seed)
        else:
            order = super()._get_train_sampler(rows)
        return FilledUpOrder(order, train_dataset, lambda: int(self.state.epoch or 0))

    def heldout_batches(self, rows: list[list[EncodedRow]] | None = None) -> list[dict]:
        """This rank's batches: every row once, and equally many batches on every rank."""
        rows = sorted(rows or self.eval_dataset, key=lambda documents: sum(map(len, documents)))
        ranks, size = self.args.world_size, self.args.per_device_eval_batch_size
        mine = list(FilledUp(rows, ranks))[self.args.process_index :: ranks]
        return [self.data_collator(mine[i : i + size]) for i in range(0, len(mine), size)]

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, filled up with blank rows; its workers ignore signals to the whole job."""
        args = self.args
        size = self._train_batch_size
        alone = args.world_size == 1 or args.dataloader_drop_last
        rows = FilledUp(self.train_dataset, 1 if alone else size * args.world_size)
        loader = self._get_dataloader(
            rows, "Training", size, self._get_train_sampler, is_training=True
        )
        if args.dataloader_num_workers:
            # Accelerate iterates over the loader that it wraps, and copies the wrapper on a resume.
            for each in (loader, loader.base_dataloader):
                each.multiprocessing_context = Workers()
        return loader

    def _run_epoch(self, *args, **kw) -> None:
        """Trainer's; it would train one step more if a run resumed from its last step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kw)
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model, trial) -> None:
        if self.non_finite.allows_checkpoint():
            write_checkpoint(self, self.run_identity)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the model, its generation_config and, separately, the hidden-state projections."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        mark = f"{PROJECTIONS}."
        projections = {k.split(mark)[1]: v.contiguous() for k, v in state_dict.items() if mark in k}
        rest = {k: v for k, v in state_dict.items() if mark not in k}
        super()._save(output_dir, rest)
        folder = output_dir or self.args.output_dir
        if self.args.should_save:  # PEFT saves none, and without end tokens generation may not stop
            causal_lm(self.model).generation_config.save_pretrained(folder)
        if projections and self.args.should_save:
            save_file(projections, f"{folder}/{PROJECTIONS}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Load the model and the projections of the hidden-state loss."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.hidden and hasattr(causal_lm(self.model), PROJECTIONS):
            saved = load_file(f"{resume_from_checkpoint}/{PROJECTIONS}.safetensors")
            getattr(causal_lm(self.model), PROJECTIONS).load_state_dict(saved)
