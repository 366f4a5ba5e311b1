"""SFT and distillation on Transformers' Trainer: one class, because they differ in the loss alone.

The loss of a micro-batch is the SUM over its target tokens. Gradients are averaged over processes by
DDP and DeepSpeed, so it is multiplied by world size / target tokens of the whole step, here and
nowhere else.
"""

import contextlib
import math

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer

from kd.data.masks import IGNORED, EncodedRow
from kd.losses.fused import METRICS, Objective
from kd.models.heads import LossInputs, return_loss
from kd.teachers.live import LiveTeacher


class DistillationTrainer(Trainer):
    """A Trainer whose loss is `objective`; without a teacher its soft_weight is 0, plain SFT."""

    def __init__(
        self, *args, objective: Objective, vocabulary: int, teacher: LiveTeacher | None = None, **kw
    ):
        super().__init__(*args, **kw)
        self.objective = objective
        self.vocabulary = vocabulary
        self.teacher = teacher
        # Without this Trainer divides by the accumulation steps, on top of the token count.
        self.model_accepts_loss_kwargs = True
        return_loss(causal_lm(self.model))
        self.metric_sums = torch.zeros(len(METRICS), device=self.args.device)
        self.first_batch = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The normalised training loss of a micro-batch; metrics stay on the device."""
        outputs = self.wrapped_call(model, inputs)
        if self.first_batch:
            self.check_first_batch(outputs["metrics"])
        self.metric_sums += outputs["metrics"]
        loss = outputs["loss"] * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def check_first_batch(self, metrics: Tensor) -> None:
        """Raise ValueError where a model overflows; a loss scale would skip its steps in silence."""
        self.first_batch = False
        values = dict(zip(METRICS, metrics.tolist(), strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            whose = "teacher" if "teacher_cross_entropy" in broken else "student"
            raise ValueError(
                f"the first batch has no finite {', '.join(broken)}: look at the {whose}. In "
                "float16, activations beyond 65504 overflow (some Qwen2 models pass that): use "
                "bf16 where there is hardware for it, or float32"
            )

    def wrapped_call(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The wrapped student on one micro-batch: {"loss": sum, "metrics": sums}."""
        signal = self.teacher.signal(batch) if self.teacher else contextlib.nullcontext()
        with signal as teacher:
            return model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                loss_inputs=LossInputs(batch["labels"], self.objective, self.vocabulary, teacher),
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's figures with ours added, summed over all ranks since the last call."""
        if "loss" in logs:  # the only moment at which device values are read
            logs.update(self.means(self.metric_sums))
            self.metric_sums.zero_()
        super().log(logs, start_time)

    def means(self, sums: Tensor) -> dict[str, float]:
        """Sums over tokens of this rank to means over the tokens of all ranks."""
        if dist.is_initialized():
            sums = sums.clone()
            dist.all_reduce(sums)
        values = dict(zip(METRICS, sums.tolist(), strict=True))
        tokens = max(values.pop("tokens"), 1.0)
        shown = METRICS[:-1] if self.teacher else ("cross_entropy", "student_entropy")
        return {name: values[name] / tokens for name in shown}

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Held-out means over all target tokens; Trainer's own mean over batches is not that."""
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(len(METRICS), device=self.args.device)
        quiet = not self.is_world_process_zero() or self.args.disable_tqdm
        for batch in tqdm(
            self.heldout_batches(eval_dataset), desc="held-out rows", leave=False, disable=quiet
        ):
            sums += self.wrapped_call(model, self._prepare_inputs(batch))["metrics"]
        means = self.means(sums)
        weight = self.objective.soft_weight
        means["loss"] = (1 - weight) * means["cross_entropy"]
        means["loss"] += weight * means.get("divergence", 0.0)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def heldout_batches(self, rows: list[list[EncodedRow]] | None = None) -> list[dict]:
        """This rank's batches: every row once, and equally many batches on every rank.

        A prepared DataLoader would repeat rows to even out the ranks; here rows without a target
        fill up instead.
        """
        rows = sorted(rows or self.eval_dataset, key=lambda documents: sum(map(len, documents)))
        ranks, size = self.args.world_size, self.args.per_device_eval_batch_size
        blank = [EncodedRow(rows[0][0].input_ids, [IGNORED] * len(rows[0][0]))]
        rows = rows + [blank] * (-len(rows) % ranks)
        mine = rows[self.args.process_index :: ranks]
        return [self.data_collator(mine[i : i + size]) for i in range(0, len(mine), size)]


def causal_lm(model: torch.nn.Module) -> torch.nn.Module:
    """The CausalLM itself, inside PEFT's wrapper where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
