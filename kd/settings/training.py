"""What a recipe sets of training, and the batch that is derived from it."""

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from kd.recipe import setting

CHECK_STEPS, CHECK_RATE = 10, 5  # of --check; the rate multiplies learning_rate


def derive_batch(
    global_batch: int,
    processes: int,
    cap: int,
    micro: int | None = None,
    accumulation: int | None = None,
) -> tuple[int, int]:
    """(micro-batch, accumulation steps) with global = processes * micro * accumulation.

    The micro-batch is the largest divisor of global_batch / processes that is at most `cap`.
    What is given is taken as it is. Raises ValueError where the numbers do not divide.
    """
    if micro and accumulation:
        return micro, accumulation
    if global_batch < 1:
        raise ValueError("global_batch_size: not given; wanted rows an optimizer step (32, say)")
    if global_batch % processes:
        near = [n for n in range(1, 2 * global_batch + 1) if n % processes == 0]
        best = min(near, key=lambda n: abs(n - global_batch)) if near else processes
        raise ValueError(
            f"global_batch_size: {global_batch} does not divide by {processes} processes; "
            f"the nearest that does is {best}"
        )
    rows = global_batch // processes
    for name, given in (
        ("per_device_train_batch_size", micro),
        ("gradient_accumulation_steps", accumulation),
    ):
        if given and rows % given:
            raise ValueError(
                f"{name}: {given} does not divide the {rows} rows a process "
                f"(global_batch_size {global_batch} / {processes} processes)"
            )
    if accumulation:
        return rows // accumulation, accumulation
    micro = micro or max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(cap, 1))
    return micro, rows // micro


@dataclass
class TrainingSettings(TrainingArguments):
    """Transformers' training arguments, with one batch size in place of three."""

    global_batch_size: int = setting(0, "rows an optimizer step, over all processes")
    max_per_device_train_batch_size: int = setting(8, "cap on the micro-batch; a profile sets it")
    per_device_train_batch_size: int | None = setting(None, "derived from global_batch_size")
    gradient_accumulation_steps: int | None = setting(None, "derived from global_batch_size")
    per_device_eval_batch_size: int | None = setting(None, "the training micro-batch by default")
    gpu_memory_gb: float | None = setting(
        None, "GiB that a process may use at most; a profile sets its GPU's; without: all there is"
    )
    logging_steps: float = setting(10, "optimizer steps between two points of every curve")
    sample_prompts: int = setting(
        4, "held-out beginnings that student and teacher write on at every evaluation; 0: none"
    )
    sample_tokens: int = setting(48, "tokens they write after each")
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    save_total_limit: int | None = setting(2, "checkpoints kept")
    early_stopping_patience: int | None = setting(
        None, "stop after so many evaluations without a better metric_for_best_model"
    )
    check: bool = setting(
        False, "ten steps on eight rows in output_dir/check, which must over-fit: try this first"
    )
    max_skipped_steps: int = setting(
        3, "steps in a row without a finite loss or gradient that are left out; one more: an error"
    )
    logging_nan_inf_filter: bool = setting(False, "true would log another loss in place of nan")
    remove_unused_columns: bool = setting(False, "the collator decides what the models see")
    ddp_find_unused_parameters: bool | None = setting(False, "every trained weight gets a gradient")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir: not given; wanted the folder of this run")
        if self.check:
            self.set_up_check()
        self.settle_batch(int(os.environ.get("WORLD_SIZE", 1)))
        super().__post_init__()

    def settle_batch(self, processes: int) -> None:
        """Derive what is not given of the batch; what is given is not the plan's to change."""
        self.micro_batch_given = bool(
            self.per_device_train_batch_size or self.gradient_accumulation_steps
        )
        self.eval_batch_given = bool(self.per_device_eval_batch_size)
        self.use_batch(
            *derive_batch(
                self.global_batch_size,
                processes,
                self.max_per_device_train_batch_size,
                self.per_device_train_batch_size,
                self.gradient_accumulation_steps,
            )
        )
        self.global_batch_size = (
            processes * self.per_device_train_batch_size * self.gradient_accumulation_steps
        )

    def use_batch(self, micro: int, accumulation: int) -> None:
        self.per_device_train_batch_size = micro
        self.gradient_accumulation_steps = accumulation
        if not self.eval_batch_given:
            self.per_device_eval_batch_size = micro
        if getattr(self, "hf_deepspeed_config", None):  # it took the numbers when it was made
            self.hf_deepspeed_config.config |= {
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": accumulation,
                "train_batch_size": self.world_size * micro * accumulation,
            }

    def set_up_check(self) -> None:
        """Ten steps that learn fast, and a checkpoint; nothing of the run itself is touched."""
        self.output_dir, self.report_to = f"{self.output_dir}/check", ["none"]
        self.max_steps = self.save_steps = CHECK_STEPS
        self.logging_strategy = self.save_strategy = "steps"
        self.logging_steps, self.eval_strategy = 1, "no"
        self.learning_rate *= CHECK_RATE
        self.lr_scheduler_type, self.warmup_steps = "constant", 0
        self.load_best_model_at_end, self.early_stopping_patience = False, None
