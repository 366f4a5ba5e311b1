"""Whether a checkpoint belongs to the run that wants to go on from it."""

import json
from pathlib import Path
from typing import Any

from kd.settings.training import TrainingSettings
from kd.training.checkpoints.manifest import read_manifest

# Keys that change what is reported, kept or how fast it goes, and no weight. All others must be equal.
FREE = {
    "output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica",
    "logging_steps", "logging_first_step", "logging_strategy", "logging_nan_inf_filter",
    "sample_prompts", "sample_tokens", "save_steps", "save_strategy", "save_total_limit", "project", "trackio_space_id",
    "ddp_backend", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataloader_persistent_workers", "per_device_eval_batch_size",
    "max_per_device_train_batch_size", "max_skipped_steps", "push_to_hub", "hub_token", "hub_model_id",
    "data_cache", "data_workers", "skip_memory_metrics", "resume_from_checkpoint", "local_rank", "_n_gpu",
    "deepspeed",  # its stage is compared apart
    "teacher_workspace_mb",
}  # fmt: skip
LENGTH = {"max_steps", "num_train_epochs"}  # free where no learning rate depends on the last step


def about_run(training: TrainingSettings, recipe: dict[str, Any], zero_stage: int | None) -> dict:
    """What a manifest says of its run."""
    return {
        "processes": training.world_size,
        "zero_stage": zero_stage,
        "recipe": json.loads(json.dumps(recipe, default=str)),
    }


def check_same_run(checkpoint: str, then: dict, now: dict) -> None:
    """Raise ValueError where going on would not be the run that was begun, with what differs."""
    remedy = "or start anew in another output_dir"
    for key, what in (("processes", "processes"), ("zero_stage", "ZeRO stage")):
        if then[key] != now[key]:
            raise ValueError(
                f"{checkpoint} was written with {what} {then[key]}, and this start has "
                f"{now[key]}: its shards of the optimizer fit no other. Start as before, {remedy}"
            )
    free = FREE | (LENGTH if constant_schedule(then["recipe"]) else set())
    both = [k for k in then["recipe"] if k in now["recipe"] and k not in free]
    changed = [k for k in both if then["recipe"][k] != now["recipe"][k]]
    if changed:
        lines = [f"  {k}: {then['recipe'][k]!r} then, {now['recipe'][k]!r} now" for k in changed]
        longer = "; the learning rate of every step depends on the last one"
        why = longer if LENGTH & set(changed) else ""
        raise ValueError(
            f"{checkpoint} is of another recipe{why}. Take the change back, {remedy}:\n"
            + "\n".join(lines)
        )


def check_same_rows(checkpoint: str, rows: str) -> None:
    """Raise ValueError where the recipe is the same and what its files hold is not."""
    manifest = read_manifest(Path(checkpoint))
    if manifest and manifest["about"].get("rows") != rows:
        raise ValueError(
            f"{checkpoint} was trained on other rows: the files that `data` names, the tokenizer or "
            "its template have changed. Bring them back, or start anew in another output_dir"
        )


def constant_schedule(recipe: dict[str, Any]) -> bool:
    """Whether a run may be made longer: no learning rate is a function of its length."""
    kind, warmup = str(recipe.get("lr_scheduler_type")), recipe.get("warmup_steps") or 0
    return kind == "constant" or (kind == "constant_with_warmup" and warmup >= 1)
