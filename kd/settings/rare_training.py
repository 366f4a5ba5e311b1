"""Keys of Transformers' TrainingArguments that few runs need, and those that are refused."""

from dataclasses import dataclass
from typing import Literal

from kd.recipe import setting

# Optimizers of Transformers that take every kind of weight here.
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "adamw_torch_4bit",
    "adamw_torch_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_32bit",
    "paged_lion_8bit", "adafactor", "adagrad", "sgd", "rmsprop", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip


@dataclass
class RareTrainingKeys:
    """Rarely needed keys of Transformers."""

    RARE = True

    adam_beta1: float = setting(0.9, "Decay of Adam's mean of the gradients.", least=0, below=1)
    adam_beta2: float = setting(
        0.999, "Decay of Adam's mean of the squared gradients.", least=0, below=1
    )
    adam_epsilon: float = setting(1e-8, "Term that keeps Adam from dividing by 0.", above=0)
    optim_args: str | None = setting(
        None, "Further arguments of the optimizer, as name=value, separated by commas."
    )
    gradient_checkpointing_kwargs: str | None = setting(
        None, "JSON object of arguments of gradient checkpointing, such as {use_reentrant: false}."
    )
    tf32: bool | None = setting(
        None, "Allow TF32 in float32 matrix products, on Ampere GPUs and newer ones."
    )
    torch_compile: bool = setting(False, "Compile the student with torch.compile.")
    torch_compile_backend: str | None = setting(
        None, "Backend of torch.compile; setting it turns torch_compile on."
    )
    torch_compile_mode: str | None = setting(
        None, "Mode of torch.compile; setting it turns torch_compile on."
    )
    neftune_noise_alpha: float | None = setting(
        None, "Size of the noise on the student's embeddings in training (NEFTune).", least=0
    )
    torch_empty_cache_steps: int | None = setting(
        None, "Empty the GPU's cache of free memory every so many steps.", least=1
    )
    full_determinism: bool = setting(
        False, "Use deterministic algorithms only, which may be slower."
    )
    data_seed: int | None = setting(None, "Seed of the order of rows. Default: seed.", least=0)
    logging_strategy: Literal["no", "steps", "epoch"] = setting("steps", "When to log.")
    logging_first_step: bool = setting(False, "Also log the first optimizer step.")
    logging_nan_inf_filter: bool = setting(
        False,
        "Log a NaN or infinite loss as the average of the logging window; keep false to see it.",
    )
    max_skipped_steps: int = setting(
        3,
        "Consecutive steps with a non-finite loss or gradient that are skipped before an error.",
        least=0,
    )
    log_level: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] = (
        setting("passive", "Level of Transformers' own log messages on the main process.")
    )
    log_level_replica: Literal[
        "detail", "debug", "info", "warning", "error", "critical", "passive"
    ] = setting("warning", "Level of Transformers' own log messages on the other processes.")
    disable_tqdm: bool | None = setting(None, "Show no progress bars.")
    run_name: str | None = setting(None, "Name of the run in wandb and other trackers.")
    project: str = setting("huggingface", "Name of the project in Trackio.")
    eval_delay: float = setting(
        0, "Steps or epochs, as eval_strategy counts, before the first evaluation.", least=0
    )
    eval_on_start: bool = setting(False, "Also evaluate before the first step.")
    save_only_model: bool = setting(
        False, "Save checkpoints without optimizer state; a run cannot resume from them."
    )
    dataloader_drop_last: bool = setting(
        False, "Leave out the last micro-batch of an epoch if it is not full."
    )
    dataloader_num_workers: int = setting(
        0, "Number of processes per rank that prepare batches; 0: the rank itself.", least=0
    )
    dataloader_prefetch_factor: int | None = setting(
        None, "Number of batches that each worker prepares in advance.", least=1
    )
    dataloader_persistent_workers: bool = setting(False, "Keep the workers between two epochs.")
    dataloader_pin_memory: bool = setting(
        True, "Prepare batches in memory from which a GPU copies faster."
    )
    ddp_backend: Literal["nccl", "gloo", "mpi"] | None = setting(
        None, "Backend of torch.distributed. Default: nccl on GPUs, gloo on CPUs."
    )
    ddp_bucket_cap_mb: int | None = setting(
        None, "Size of the buckets in which DDP sends gradients, in MiB.", least=1
    )
    ddp_timeout: int = setting(
        1800, "Seconds after which a rank that waits for another one gives up.", least=1
    )


_NO_EFFECT = "it is a key of Transformers that has no effect here; remove it"
_UPLOAD = "runs are not uploaded; when the run has ended, upload output_dir (hf upload)"
_ALWAYS = "train/ always trains and evaluates if the recipe has eval_data; remove it"
_FIXED = "this project sets it itself; remove it"
_DEEPSPEED = "models are sharded with DeepSpeed (deepspeed, teacher_deepspeed); remove it"
_REASONS = {
    "bf16": "wanted precision: bfloat16",
    "fp16": "wanted precision: float16",
    "label_smoothing_factor": "the loss here has no label smoothing; remove it (soft_weight mixes "
    "the teacher's distribution in)",
    "resume_from_checkpoint": "a run resumes by itself from the newest checkpoint in output_dir; "
    "remove it, and start the same command again",
    "average_tokens_across_devices": "the loss is always averaged over the target tokens of all "
    "processes; remove it",
    "auto_find_batch_size": "the memory plan chooses the micro-batch; remove it",
    "use_liger_kernel": "the loss here is fused already; remove it",
    "activation_checkpointing": "wanted gradient_checkpointing, its name in this project",
    "activation_checkpointing_kwargs": "wanted gradient_checkpointing_kwargs, its name in this "
    "project",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always save a checkpoint; remove it",
    "ignore_data_skip": "a resumed run always goes on with the next rows; remove it",
} | {
    key: reason
    for reason, keys in {
        _ALWAYS: "do_train do_eval do_predict",
        _UPLOAD: "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision",
        _FIXED: "remove_unused_columns label_names ddp_find_unused_parameters local_rank "
        "accelerator_config length_column_name restore_callback_states_from_checkpoint use_cache",
        _DEEPSPEED: "fsdp fsdp_config parallelism_config",
        _NO_EFFECT: "bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches "
        "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "liger_kernel_config optim_target_modules log_on_each_node save_on_each_node debug "
        "include_num_input_tokens_seen trackio_space_id trackio_bucket_id trackio_static_space_id "
        "dataloader_multiprocessing_context dataloader_in_order ddp_broadcast_buffers "
        "ddp_static_graph skip_memory_metrics",
    }.items()
    for key in keys.split()
}
# Why a key of TrainingArguments is refused; a test compares the keys with Transformers' own.
UNUSED = {key: f"{key}: {reason}" for key, reason in _REASONS.items()}
