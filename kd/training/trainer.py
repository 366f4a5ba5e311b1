"""SFT and distillation on Transformers' Trainer: one class, because they differ in the loss alone.

The loss of a micro-batch is the SUM over its target tokens. Gradients are averaged over processes by
DDP and DeepSpeed, so it is multiplied by world size / target tokens of the whole step, here and
nowhere else.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer

from kd.data.encoding import IGNORE_INDEX, EncodedRow
from kd.data.packing import ON_POLICY, GroupedByLength, by_length
from kd.data.workers import Workers
from kd.distributed import all_sum
from kd.losses.fused import Objective
from kd.losses.hidden import PROJECTIONS, HiddenObjective
from kd.models.heads import REPORTED, LossInputs, causal_lm, return_loss
from kd.run.signals import StopsOnSignal
from kd.teachers.aligned_teacher import AlignedTeacher
from kd.teachers.cached import CachedTeacher
from kd.teachers.live import LiveTeacher
from kd.training.checkpoints.checkpoint import write_checkpoint
from kd.training.non_finite import NonFinite
from kd.training.on_policy import StudentRows
from kd.training.rank_sync import RankSync
from kd.training.samples import Samples
from kd.training.step_metrics import Figures, means_over_tokens, shown_figures
from kd.training.stragglers import Pace
from kd.training.watchdog import Watchdog


class DistillationTrainer(Trainer):
    """A Trainer whose loss is `objective`; without a teacher its soft_weight is 0, plain SFT."""

    def __init__(
        self,
        *args,
        objective: Objective,
        vocabulary: int,
        teacher: LiveTeacher | CachedTeacher | AlignedTeacher | None = None,
        hidden: HiddenObjective | None = None,
        about: dict[str, Any] | None = None,
        work: tuple[float, float, float] | None = None,
        student_rows: StudentRows | None = None,
        **kw,
    ):
        super().__init__(*args, **kw)
        self.about = about or {}  # of the run, for the manifest of every checkpoint
        self.objective = objective
        self.hidden = hidden
        self.vocabulary = vocabulary
        self.teacher = teacher
        self.student_rows = student_rows
        self.signals: Iterator = iter(())  # the teacher's, of the step's micro-batches to come
        # Without this Trainer divides by the accumulation steps, on top of the token count.
        self.model_accepts_loss_kwargs = True
        return_loss(causal_lm(self.model))
        shown = shown_figures(teacher is not None, hidden is not None)
        self.figures = Figures(self.args.device, shown, work)
        self.times = self.figures.times
        self.times.watch(causal_lm(self.model).get_output_embeddings(), "loss")
        self.samples = Samples(self, self.args.sample_prompts, self.args.sample_tokens)
        self.first_batch = True
        self.stop, self.watchdog, self.pace = StopsOnSignal(), Watchdog(), Pace(self.figures)
        self.non_finite = NonFinite(self, self.args.max_skipped_steps)
        rank_sync = RankSync(self.non_finite, self.stop)
        parts = (self.watchdog, self.pace, self.non_finite, self.stop, rank_sync, self.times)
        for callback in parts:
            self.add_callback(callback)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, all of which the teacher may see at once."""
        self.times.begin_step()
        with self.times.of("data"):
            batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.student_rows:  # chosen by their places, so before those change
            batches = self.with_student_rows(batches)
            items = self._get_num_items_in_batch(batches, device)
        with self.times.of("data"):
            batches = by_length(batches)
        self.signals = self.signals_of(batches)
        return batches, items

    def with_student_rows(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The micro-batches with some of the answers written by the student as it is now."""
        self.watchdog.beat()
        with self.times.of("generation"), self.accelerator.autocast():
            batches, answers, cut = self.student_rows.put_into(
                batches, self.args, self.state.global_step
            )
        self.figures.add_written(answers, cut)
        self.watchdog.beat()
        return batches

    def signals_of(self, batches: list[dict[str, Tensor]]) -> Iterator:
        """What the teacher gives each batch, in turn: contexts of (signal, states of its layers)."""
        if self.teacher is None:
            return itertools.repeat(contextlib.nullcontext((None, None)))
        layers = [theirs for _, theirs in self.hidden.layers] if self.hidden else []
        return self.teacher.signals(batches, layers)

    def training_step(self, *args, **kw):
        with self.times.of("backward"):  # what is neither the forward's nor the optimizer's
            return super().training_step(*args, **kw)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The normalised training loss of a micro-batch; metrics stay on the device."""
        with self.times.of("teacher"):
            signal = next(self.signals)
        outputs = self.wrapped_call(model, inputs, signal)
        if self.first_batch:
            if self.is_deepspeed_enabled:
                self.times.watch_optimizer_of(model)
            self.check_first_batch(outputs["metrics"])
        self.figures.add(outputs["metrics"], inputs)
        self.non_finite.note(inputs["input_ids"], outputs["loss"])
        loss = outputs["loss"] * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def check_first_batch(self, metrics: Tensor) -> None:
        """Raise ValueError where a model overflows; a loss scale would skip its steps in silence."""
        self.first_batch = False
        values = dict(zip(REPORTED, metrics.tolist(), strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            whose = "teacher" if "teacher_cross_entropy" in broken else "student"
            raise ValueError(
                f"the first batch has no finite {', '.join(broken)}: look at the {whose}. In "
                "float16, activations beyond 65504 overflow (some Qwen2 models pass that): use "
                "bf16 where there is hardware for it, or float32"
            )

    def wrapped_call(self, model: torch.nn.Module, batch: dict[str, Tensor], signal) -> dict:
        """The wrapped student on one micro-batch: {"loss": sum, "metrics": sums}."""
        self.watchdog.beat()
        with signal as (teacher, states), self.times.of("student"):
            return model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                loss_inputs=LossInputs(
                    batch["labels"],
                    self.objective,
                    self.vocabulary,
                    teacher,
                    self.hidden,
                    states,
                    batch.get(ON_POLICY),
                ),
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures with ours added, of all ranks since the last call."""
        if "loss" in logs:  # the only moment at which device values are read
            logs.update(self.figures.read())
            self._tr_loss.zero_()  # Trainer subtracts it from itself, which leaves nan where it is
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out means over all target tokens; Trainer's own mean over batches is not that."""
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(len(REPORTED), device=self.args.device)
        quiet = not self.is_world_process_zero() or self.args.disable_tqdm
        batches = self.heldout_batches(eval_dataset)
        signals = self.signals_of(batches)
        for batch in tqdm(batches, desc="held-out rows", leave=False, disable=quiet):
            inputs = self._prepare_inputs(batch)
            sums += self.wrapped_call(model, inputs, next(signals))["metrics"]
        means = means_over_tokens(all_sum(sums), self.figures.shown)
        weight = self.objective.soft_weight
        means["loss"] = (1 - weight) * means["cross_entropy"]
        means["loss"] += weight * means.get("divergence", 0.0)
        if self.hidden:
            means["loss"] += self.hidden.weight * means["hidden"]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.samples.log()
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _get_train_sampler(self, train_dataset=None):
        """Trainer's own, but for rows grouped by length: ours is told the lengths and the epoch."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = (train_dataset or self.train_dataset).lengths
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(step, lengths, seed)

    def heldout_batches(self, rows: list[list[EncodedRow]] | None = None) -> list[dict]:
        """This rank's batches: every row once, and equally many batches on every rank.

        A prepared DataLoader would repeat rows to even out the ranks; here rows without a target
        fill up instead.
        """
        rows = sorted(rows or self.eval_dataset, key=lambda documents: sum(map(len, documents)))
        ranks, size = self.args.world_size, self.args.per_device_eval_batch_size
        blank = [EncodedRow(rows[0][0].input_ids, [IGNORE_INDEX] * len(rows[0][0]))]
        rows = rows + [blank] * (-len(rows) % ranks)
        mine = rows[self.args.process_index :: ranks]
        return [self.data_collator(mine[i : i + size]) for i in range(0, len(mine), size)]

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.args.dataloader_num_workers:
            # Accelerate iterates over the one it wraps; where a run goes on it copies the wrapper's.
            for each in (loader, loader.base_dataloader):
                each.multiprocessing_context = Workers()
        return loader

    def _save_checkpoint(self, model, trial) -> None:
        write_checkpoint(self)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, with generation_config, and the projections of the hidden-state loss apart."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        mark = f"{PROJECTIONS}."
        own = {k.split(mark)[1]: v.contiguous() for k, v in state_dict.items() if mark in k}
        rest = {k: v for k, v in state_dict.items() if mark not in k}
        super()._save(output_dir, rest)
        if self.args.should_save:  # an adapter has none of its own; without one it may not stop
            causal_lm(self.model).generation_config.save_pretrained(
                output_dir or self.args.output_dir
            )
        if own and self.args.should_save:
            save_file(own, f"{output_dir or self.args.output_dir}/{PROJECTIONS}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.hidden and hasattr(causal_lm(self.model), PROJECTIONS):
            saved = load_file(f"{resume_from_checkpoint}/{PROJECTIONS}.safetensors")
            getattr(causal_lm(self.model), PROJECTIONS).load_state_dict(saved)
