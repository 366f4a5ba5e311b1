"""Recipe keys of the optimization, and the micro-batch that is derived from the global batch."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from kd.distributed import world_size
from kd.recipe import setting

CHECK_STEPS, CHECK_RATE = 10, 5  # steps of --check; factor of its learning rate


def derive_batch(
    global_batch: int,
    processes: int,
    cap: int,
    micro: int | None = None,
    accumulation: int | None = None,
) -> tuple[int, int]:
    """Return (micro, accumulation) with global_batch = processes * micro * accumulation.

    The micro-batch is the largest divisor of global_batch / processes that is at most `cap`.
    A given `micro` or `accumulation` is kept. Raises ValueError if the numbers do not divide.
    """
    if micro and accumulation:
        return micro, accumulation
    if global_batch < 1:
        raise ValueError(
            "global_batch_size: not given; wanted the rows per optimizer step (for example 32)"
        )
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
                f"{name}: {given} does not divide the {rows} rows per process "
                f"(global_batch_size {global_batch} / {processes} processes)"
            )
    if accumulation:
        return rows // accumulation, accumulation
    micro = micro or max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(cap, 1))
    return micro, rows // micro


@dataclass
class TrainingSettings(TrainingArguments):
    """The training arguments of Transformers, with one batch size instead of three.

    Raises ValueError for a missing output_dir and for batch sizes that do not divide.
    """

    global_batch_size: int = setting(
        0, "Number of rows per optimizer step, summed over all processes."
    )
    max_per_device_train_batch_size: int = setting(
        8, "Upper limit of the micro-batch in rows; launch profiles set it."
    )
    per_device_train_batch_size: int | None = setting(
        None,
        "Micro-batch in rows. Default: the largest that divides global_batch_size, respects "
        "max_per_device_train_batch_size and fits in memory.",
    )
    gradient_accumulation_steps: int | None = setting(
        None, "Micro-batches per optimizer step and process. Default: from global_batch_size."
    )
    per_device_eval_batch_size: int | None = setting(
        None, "Rows per held-out batch. Default: the micro-batch of training."
    )
    gpu_memory_gb: float | None = setting(
        None,
        "Memory that each process may use, in GiB; launch profiles set it. Default: all available "
        "memory.",
    )
    logging_steps: float = setting(
        10,
        "Optimizer steps between two log entries; each entry averages over the steps since the "
        "previous one.",
    )
    sample_prompts: int = setting(
        4,
        "Number of held-out rows whose beginning student and teacher continue at every "
        "evaluation; 0 disables these samples.",
    )
    sample_tokens: int = setting(48, "Number of tokens generated per sample at every evaluation.")
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    save_total_limit: int | None = setting(2, "Number of checkpoints to keep.")
    early_stopping_patience: int | None = setting(
        None, "Stop after this many evaluations without an improvement of metric_for_best_model."
    )
    check: bool = setting(
        False,
        "Test the set-up: train ten steps on eight rows in output_dir/check and require the loss "
        "to fall. The run itself is not touched.",
    )
    max_skipped_steps: int = setting(
        3, "Consecutive steps with a non-finite loss or gradient that are skipped before an error."
    )
    logging_nan_inf_filter: bool = setting(
        False,
        "Log a NaN or infinite loss as the average of the logging window; keep false to see it.",
    )
    remove_unused_columns: bool = setting(
        False, "Keep false: the collator decides which columns the model gets."
    )
    ddp_find_unused_parameters: bool | None = setting(
        False, "Keep false: every trained weight gets a gradient in every step."
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir: not given; wanted the folder of this run")
        if self.check:
            self._set_up_check()
        self.settle_batch(world_size())
        super().__post_init__()

    def settle_batch(self, processes: int) -> None:
        """Derive the batch sizes that are not given; the memory plan leaves given ones unchanged.

        Raises ValueError if the numbers do not divide.
        """
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
        """Set micro-batch and accumulation steps, also in the DeepSpeed configuration."""
        self.per_device_train_batch_size = micro
        self.gradient_accumulation_steps = accumulation
        if not self.eval_batch_given:
            self.per_device_eval_batch_size = micro
        if getattr(self, "hf_deepspeed_config", None):  # it copied the numbers when it was built
            self.hf_deepspeed_config.config |= {
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": accumulation,
                "train_batch_size": self.world_size * micro * accumulation,
            }

    def _set_up_check(self) -> None:
        """Ten fast steps and one checkpoint in their own folder, with no evaluation."""
        self.output_dir, self.report_to = f"{self.output_dir}/check", ["none"]
        self.max_steps = self.save_steps = CHECK_STEPS
        self.logging_strategy = self.save_strategy = "steps"
        self.logging_steps, self.eval_strategy = 1, "no"
        self.learning_rate *= CHECK_RATE
        self.lr_scheduler_type, self.warmup_steps = "constant", 0
        self.load_best_model_at_end, self.early_stopping_patience = False, None
