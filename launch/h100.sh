#!/usr/bin/env bash
# Machine: one H100 (80 GB), or NUM_PROCESSES=8 of them. bf16. Student under ZeRO-2; teacher whole on each GPU, or sharded
# with --teacher_deepspeed ds_configs/teacher_zero3.json. Rehearsed on CPUs, not measured on H100s.
#   launch/h100.sh train/distill.py --config recipes/d_qwen1.5_32b_to_14b/distill.yaml
#   NUM_PROCESSES=8 launch/h100.sh train/distill.py --config recipes/d_qwen1.5_32b_to_14b/distill.yaml
#   launch/h100.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/h100.yaml
flags=(--bf16 true --max_per_device_train_batch_size 8 --gradient_checkpointing true --gpu_memory_gb 79)
distill_flags=()
plan_flags=(--tflops 989 --memory_gb_s 3350 --link_gb_s 450)  # the vendor's numbers
generate_flags=()
source "$(dirname "$0")/profile.sh"
