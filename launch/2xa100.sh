#!/usr/bin/env bash
# Machine: two A100 (80 GB each, NVLink; GPU_MEMORY_GB=40 in the environment for 40 GB). bf16.
# Student under ZeRO-2; teacher sharded over both GPUs by ZeRO-3. Rehearsed on CPUs, not measured on A100s.
#   launch/2xa100.sh train/distill.py --config recipes/d_qwen1.5_32b_to_14b/distill.yaml
#   launch/2xa100.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/2xa100.yaml
flags=(--bf16 true --max_per_device_train_batch_size 4 --gradient_checkpointing true --gpu_memory_gb "${GPU_MEMORY_GB:-79}")
distill_flags=(--teacher_deepspeed ds_configs/teacher_zero3.json)
plan_flags=(--tflops 312 --memory_gb_s 2039 --link_gb_s 300)  # the vendor's numbers
generate_flags=()
source "$(dirname "$0")/profile.sh"
