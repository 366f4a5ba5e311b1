"""Check that a checkpoint belongs to the run that wants to resume from it."""

import json
from pathlib import Path
from typing import Any

from kd.run.finished import changed_settings, describe_changes
from kd.settings.training import TrainingSettings
from kd.training.checkpoints.manifest import read_manifest
from kd.training.longer_run import LENGTH, is_longer

# Keys that affect reports, stored files or speed, but no weight. All other keys must be equal.
FREE = {
    "output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica",
    "logging_steps", "logging_first_step", "logging_strategy", "logging_nan_inf_filter",
    "sample_prompts", "sample_tokens", "save_steps", "save_strategy", "save_total_limit",
    "project", "trackio_space_id", "ddp_backend", "ddp_timeout", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "per_device_eval_batch_size", "max_per_device_train_batch_size", "max_skipped_steps",
    "push_to_hub", "hub_token", "hub_model_id", "data_cache", "data_workers",
    "skip_memory_metrics", "resume_from_checkpoint", "local_rank", "_n_gpu",
    "teacher_workspace_mb", "gpu_memory_gb",
    "deepspeed",  # its ZeRO stage is compared separately
    # A sharded teacher gives the logits of the whole one to the last bit.
    "teacher_deepspeed", "teacher_sharded_over",
}  # fmt: skip
# The memory plan derives these from global_batch_size, and run.json records what it chose.
PLANNED = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def identify_run(
    training: TrainingSettings, recipe: dict[str, Any], zero_stage: int | None
) -> dict[str, Any]:
    """The identity of a run, stored in the manifest of every checkpoint."""
    return {
        "processes": training.world_size,
        "zero_stage": zero_stage,
        "recipe": json.loads(json.dumps(recipe, default=str)),
    }


def check_same_run(checkpoint: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError if resuming would not continue the same run; the message lists differences.

    `then` is the identity in the checkpoint's manifest, `now` that of the run being started.
    """
    compared = {"zero_stage": "ZeRO stage"}
    if now["zero_stage"] == 3:
        compared["processes"] = "processes"
    for key, what in compared.items():
        if then[key] != now[key]:
            raise ValueError(
                f"{checkpoint} was written with {what}: {then[key]}, but this run has {now[key]}; "
                "the saved optimizer shards cannot be redistributed. Start with "
                f"{what}: {then[key]}, or use a new output_dir"
            )
    may_end_later = constant_schedule(then["recipe"]) or is_longer(now["recipe"], Path(checkpoint))
    free = FREE | (LENGTH if may_end_later else set())
    if then["processes"] != now["processes"]:
        free |= PLANNED
    changes = changed_settings(then["recipe"], now["recipe"], free)
    if changes:
        reason = "; the learning rate of every step depends on the length of the run"
        raise ValueError(
            f"{checkpoint} was written with different settings"
            f"{reason if LENGTH & changes.keys() else ''}. Revert them, or use a new output_dir:\n"
            f"{describe_changes(changes)}"
        )


def check_same_rows(checkpoint: str, rows: str) -> None:
    """Raise ValueError if the settings are equal but the content of the data files is not.

    `rows` is the hash of the data files, the tokenizer and the encoding settings.
    """
    manifest = read_manifest(Path(checkpoint))
    if manifest and manifest["about"].get("rows") != rows:
        raise ValueError(
            f"{checkpoint} was trained on different rows: the files that `data` names, the "
            "tokenizer or its chat template have changed. Restore them, or use a new output_dir"
        )


def constant_schedule(recipe: dict[str, Any]) -> bool:
    """Whether no learning rate depends on the run's length, so that the run may be extended."""
    kind, warmup = str(recipe.get("lr_scheduler_type")), recipe.get("warmup_steps") or 0
    return kind == "constant" or (kind == "constant_with_warmup" and warmup >= 1)
