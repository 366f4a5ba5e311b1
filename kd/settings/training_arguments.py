"""Transformers' TrainingArguments of a run, made from its settings once all checks have passed."""

import dataclasses
import os
from typing import Any

from transformers import TrainingArguments

from kd.recipe import NONE, parse_json_object
from kd.settings.machine_file import repository_file
from kd.settings.training import LAUNCHED, MOST_ROWS, BatchSizes, TrainingSettings

JSON_KEYS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
# Transformers' new names; it still reads the old ones, with a warning.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
HALF = {"bf16": "bfloat16", "fp16": "float16"}
# What is `auto` in a recipe is chosen before; these are for a run without one.
PLAIN = {
    "precision": "float32",
    "gradient_checkpointing": False,
    "deepspeed": NONE,
    "use_cpu": False,
    "max_per_device_train_batch_size": MOST_ROWS,
}
# The collator decides which columns the model gets; every trained weight gets a gradient.
FIXED = {"remove_unused_columns": False, "ddp_find_unused_parameters": False}


class RunArguments(BatchSizes, TrainingArguments):
    """The TrainingArguments of a run, with the keys of `TrainingSettings` as attributes."""

    def __init__(self, settings: TrainingSettings) -> None:
        known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        values = vars(settings) | FIXED
        values |= {k: parse_json_object(k, values[k]) or None for k in JSON_KEYS}
        values |= {name: settings.precision == kind for name, kind in HALF.items()}
        if settings.deepspeed in (NONE, LAUNCHED):
            values["deepspeed"] = None
        else:
            values["deepspeed"] = str(repository_file(settings.deepspeed))
        # None stands for Transformers' own default.
        theirs = {RENAMED.get(k, k): v for k, v in values.items() if k in known and v is not None}
        vars(self).update({k: v for k, v in values.items() if k not in known})
        self.settings = settings
        if settings.deepspeed == NONE:  # accelerate's configuration may have one
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        TrainingArguments.__init__(self, **theirs)
        self._n_gpu = min(self.n_gpu, 1)  # Trainer would copy the model to all GPUs it sees
        if self.deepspeed and self.world_size > 1:
            import deepspeed

            # Accelerate does this on GPUs alone. Without it, ZeRO-3 loads a model as if for one
            # process, and refuses the batch sizes of several.
            deepspeed.init_distributed()

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as run.json and the checkpoints record it."""
        sizes = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "per_device_eval_batch_size",
        )
        return self.settings.to_dict() | {name: getattr(self, name) for name in sizes}


def training_arguments(**keys: Any) -> RunArguments:
    """The arguments of a run with these keys of TrainingSettings, in one process by default.

    Raises ValueError as TrainingSettings does.
    """
    return RunArguments(TrainingSettings(**PLAIN | keys))
