"""The allow-list of training keys against Transformers' own TrainingArguments."""

import dataclasses
import typing

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from kd.settings.rare_training import OPTIMIZERS, UNUSED
from kd.settings.training import TrainingSettings
from kd.settings.training_arguments import FIXED, RENAMED, training_arguments

OURS = {field.name for field in dataclasses.fields(TrainingSettings)}
THEIRS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def test_every_key_of_transformers_is_either_used_or_refused_with_a_reason():
    """A new version may have new keys; each needs a decision."""
    assert UNUSED.keys() & THEIRS == THEIRS - OURS
    assert not OURS & UNUSED.keys()
    assert UNUSED.keys() - THEIRS == set()


def test_choices_are_names_of_transformers():
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    schedules = typing.get_args(typing.get_type_hints(TrainingSettings)["lr_scheduler_type"])
    assert set(schedules) <= {name.value for name in SchedulerType}


def test_every_key_reaches_the_arguments_of_the_run(tmp_path):
    """Each key is set to a value that is neither our default nor Transformers'."""
    changed = {
        "num_train_epochs": 7.0,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
        "warmup_steps": 12,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
        "logging_steps": 3,
        "logging_first_step": True,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_delay": 2,
        "save_steps": 5,
        "save_total_limit": 6,
        "save_only_model": True,
        "seed": 1,
        "data_seed": 2,
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_drop_last": True,
        "ddp_timeout": 60,
        "sample_prompts": 2,
        "max_skipped_steps": 5,
        "disable_tqdm": True,
        "run_name": "name",
    }
    arguments = training_arguments(
        output_dir=str(tmp_path), global_batch_size=8, use_cpu=True, report_to=["none"], **changed
    )
    for key, value in changed.items():
        default = getattr(TrainingSettings, key)
        assert value != default, key
        found = getattr(arguments, RENAMED.get(key, key))
        found = getattr(found, "value", found)
        if key.endswith("kwargs"):
            value = {"min_lr_rate": 0.1} if key.startswith("lr") else {"use_reentrant": False}
        assert found == value, key
    assert {key: getattr(arguments, key) for key in FIXED} == FIXED
    assert arguments.to_dict().keys() == OURS
    assert arguments.to_dict()["per_device_train_batch_size"] == 8
