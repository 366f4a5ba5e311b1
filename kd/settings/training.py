"""Recipe keys of the optimization, and the micro-batch that is derived from the global batch.

The keys are an allow-list: those of Transformers' TrainingArguments that have an effect here, and
ours. kd/settings/training_arguments.py makes the TrainingArguments from them after all checks.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kd.distributed import world_size
from kd.recipe import (
    AUTO,
    NONE,
    check_ranges,
    mistake,
    parse_json_object,
    require_file,
    setting,
)
from kd.settings.machine_file import Precision, read_machine_file, repository_file
from kd.settings.rare_training import OPTIMIZERS, UNUSED, RareTrainingKeys

CHECK_STEPS, CHECK_RATE = 10, 5  # steps of --check; factor of its learning rate
LAUNCHED = "accelerate"  # value of `deepspeed`: the engine of accelerate's configuration
MOST_ROWS = 8  # in a micro-batch, where neither the recipe nor the machine file says
When = Literal["no", "steps", "epoch"]


def set_by_accelerate(variable: str) -> bool:
    """Whether accelerate's launcher has set a variable of the environment to true."""
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes")


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
class OutputKeys:
    """Output."""

    output_dir: str = setting(
        "", "Folder of the run: checkpoints, logs and the trained model. A run resumes from it."
    )
    report_to: list[str] = setting(
        ["tensorboard"], "Where to log: tensorboard, wandb, another tracker of Transformers, none."
    )
    logging_steps: float = setting(
        10,
        "Optimizer steps between two log entries; each entry averages over the steps since the "
        "previous one. Below 1: a share of the run.",
        above=0,
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = setting(
        "steps", "When to save a checkpoint; best needs metric_for_best_model."
    )
    save_steps: float = setting(
        500, "Optimizer steps between two checkpoints. Below 1: a share of the run.", above=0
    )
    save_total_limit: int | None = setting(2, "Number of checkpoints to keep.", least=1)
    check: bool = setting(
        False,
        "Test the set-up: train ten steps on eight rows in output_dir/check and require the loss "
        "to fall. The run itself is not touched.",
    )


@dataclass
class LengthKeys:
    """Length of the run and batch."""

    num_train_epochs: float = setting(3.0, "Number of passes over the training rows.", above=0)
    max_steps: int = setting(
        -1, "Number of optimizer steps; it replaces num_train_epochs. -1: no such limit.", least=-1
    )
    global_batch_size: int = setting(
        0, "Number of rows per optimizer step, summed over all processes.", least=0
    )
    max_per_device_train_batch_size: int | Literal["auto"] = setting(
        AUTO,
        "Upper limit of the micro-batch in rows. auto: that of the machine file, else "
        f"{MOST_ROWS}.",
        least=1,
    )
    per_device_train_batch_size: int | None = setting(
        None,
        "Micro-batch in rows. Default: of those that divide global_batch_size, respect "
        "max_per_device_train_batch_size and fit in memory, the one with the shortest step.",
        least=1,
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "Micro-batches per optimizer step and process. Default: from global_batch_size.",
        least=1,
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = setting(
        "random",
        "Order of the rows. group_by_length: rows of similar length together, for less padding.",
    )
    seed: int = setting(
        42, "Seed of the adapters' initial values, dropout and the order of rows.", least=0
    )


@dataclass
class OptimizerKeys:
    """Optimizer and learning rate."""

    learning_rate: float = setting(5e-5, "Highest learning rate.", least=0)
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = setting("linear", "How the learning rate changes after the warm-up.")
    lr_scheduler_kwargs: str | None = setting(
        None, "JSON object of arguments of the schedule, such as {min_lr_rate: 0.1}."
    )
    warmup_steps: float = setting(
        0,
        "Optimizer steps in which the learning rate rises from 0. Below 1: a share of the run.",
        least=0,
    )
    optim: str = setting(
        "adamw_torch_fused",
        "Optimizer, by its name in Transformers, such as adamw_torch or adamw_bnb_8bit.",
    )
    weight_decay: float = setting(
        0.0, "Weight decay of the optimizer; biases and norms have none.", least=0
    )
    max_grad_norm: float = setting(
        1.0, "Gradients with a larger norm are scaled down to it.", least=0, note="0: never"
    )


@dataclass
class MachineKeys:
    """Precision and machine. What is auto is chosen for the present machine, and printed."""

    machine: str = setting(
        AUTO,
        "Machine file with preferences for keys that are auto: a name in launch/machines, a path "
        "or none. auto: by the name of the present device.",
    )
    precision: Precision | Literal["auto"] = setting(
        AUTO,
        "Precision of the computation, with float32 where it matters; float16 has a dynamic loss "
        "scale. auto: bfloat16 on a GPU that has it, else float16; float32 on a CPU.",
    )
    gradient_checkpointing: bool | Literal["auto"] = setting(
        AUTO,
        "Compute activations again in the backward pass instead of keeping them. auto: if the "
        "step is shorter with it, since a larger micro-batch then fits, or nothing else fits.",
    )
    deepspeed: str = setting(
        AUTO,
        "DeepSpeed JSON of the student, or none. auto: with several processes ZeRO-2, or ZeRO-3 if "
        "only that fits; a DeepSpeed configuration of accelerate has precedence.",
    )
    use_cpu: bool | Literal["auto"] = setting(
        AUTO, "Train on the CPU. auto: if there is no GPU, or accelerate's configuration says so."
    )
    gpu_memory_gb: float | None = setting(
        None, "Memory that each process may use, in GiB. Default: all available memory.", above=0
    )


@dataclass
class EvaluationKeys:
    """Evaluation on held-out rows."""

    eval_strategy: When = setting("no", "When to measure on the held-out rows, besides at the end.")
    eval_steps: float | None = setting(
        None,
        "Optimizer steps between two evaluations. Below 1: a share of the run. Default: "
        "logging_steps.",
        above=0,
    )
    per_device_eval_batch_size: int | None = setting(
        None, "Rows per held-out batch. Default: the micro-batch of training.", least=1
    )
    sample_prompts: int = setting(
        4,
        "Number of held-out rows whose beginning student and teacher continue at every "
        "evaluation; 0 disables these samples.",
        least=0,
    )
    sample_tokens: int = setting(
        48, "Number of tokens generated per sample at every evaluation.", least=1
    )
    load_best_model_at_end: bool = setting(
        False, "Save the checkpoint that is best in metric_for_best_model instead of the last one."
    )
    metric_for_best_model: str | None = setting(
        None, "Held-out metric of the best checkpoint, such as eval_loss. Default: loss."
    )
    greater_is_better: bool | None = setting(
        None, "Whether a greater metric is better. Default: only if its name does not end in loss."
    )
    early_stopping_patience: int | None = setting(
        None,
        "Stop after this many evaluations without an improvement of metric_for_best_model.",
        least=1,
    )


class BatchSizes:
    """The three batch sizes of a run; shared by its settings and its TrainingArguments."""

    def settle_batch(self, processes: int) -> None:
        """Derive the batch sizes that are not given; the memory plan leaves given ones unchanged.

        Raises ValueError if the numbers do not divide.
        """
        self.micro_batch_given = bool(
            self.per_device_train_batch_size or self.gradient_accumulation_steps
        )
        self.eval_batch_given = bool(self.per_device_eval_batch_size)
        most = self.max_per_device_train_batch_size
        self.use_batch(
            *derive_batch(
                self.global_batch_size,
                processes,
                MOST_ROWS if most == AUTO else most,
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


@dataclass
class TrainingSettings(
    BatchSizes,
    RareTrainingKeys,
    EvaluationKeys,
    MachineKeys,
    OptimizerKeys,
    LengthKeys,
    OutputKeys,
):
    """How the model is trained: the keys of the classes above.

    Raises ValueError for a missing output_dir, for numbers out of range and for batch sizes that do
    not divide.
    """

    UNUSED = UNUSED

    def __post_init__(self) -> None:
        self.output_dir = os.path.expanduser(self.output_dir)
        self.check_keys()
        if self.check:
            self._set_up_check()
        self.settle_batch(world_size())

    def check_keys(self) -> None:
        """Check every key by itself and with the others. Raises ValueError for a wrong one."""
        check_ranges(self)
        if not self.output_dir:
            mistake("output_dir: not given; wanted the folder of this run")
        if self.max_steps == 0:
            mistake("max_steps: 0; wanted 1 or more, or -1 for no limit")
        if self.optim not in OPTIMIZERS:
            mistake(f"optim: {self.optim}; wanted one of {', '.join(OPTIMIZERS)}")
        if self.deepspeed not in (AUTO, NONE):
            require_file("deepspeed", str(repository_file(self.deepspeed)))
        if self.machine not in (AUTO, NONE):
            read_machine_file(self.machine)
        parse_json_object("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        parse_json_object("gradient_checkpointing_kwargs", self.gradient_checkpointing_kwargs)
        if self.dataloader_prefetch_factor and not self.dataloader_num_workers:
            mistake(
                "dataloader_prefetch_factor: given with dataloader_num_workers: 0; only workers "
                "prefetch, so set their number"
            )
        self._check_best_model()

    def _check_best_model(self) -> None:
        """What keeps or stops at the best model needs evaluations, and saves beside them."""
        if self.eval_strategy == "no":
            for key in ("load_best_model_at_end", "early_stopping_patience"):
                if getattr(self, key):
                    mistake(f"{key}: needs evaluations; set eval_strategy: steps or epoch")
            if self.save_strategy == "best":
                mistake("save_strategy: best; it needs evaluations, so set eval_strategy")
        elif self.load_best_model_at_end and self.save_strategy not in (self.eval_strategy, "best"):
            mistake(
                f"save_strategy: {self.save_strategy} with eval_strategy: {self.eval_strategy} and "
                "load_best_model_at_end; wanted the same for both, so that what was measured exists"
            )
        best = self.metric_for_best_model or self.load_best_model_at_end
        if self.early_stopping_patience and not best:
            mistake(
                "early_stopping_patience: no metric_for_best_model says what an improvement is; "
                "set it (eval_loss, for example)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as run.json and the checkpoints record it."""
        return asdict(self)

    def _set_up_check(self) -> None:
        """Ten fast steps and one checkpoint in their own folder, with no evaluation."""
        self.output_dir, self.report_to = str(Path(self.output_dir) / "check"), ["none"]
        self.max_steps = self.save_steps = CHECK_STEPS
        self.logging_strategy = self.save_strategy = "steps"
        self.logging_steps, self.eval_strategy = 1, "no"
        self.learning_rate *= CHECK_RATE
        self.lr_scheduler_type, self.warmup_steps = "constant", 0
        self.load_best_model_at_end, self.early_stopping_patience = False, None
