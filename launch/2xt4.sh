#!/usr/bin/env bash
# Machine: two T4 (16 GB each, PCIe; Kaggle). fp16 with a dynamic loss scale, since a T4 has no bfloat16; SDPA attention.
# Student under ZeRO-2; teacher sharded over both GPUs by ZeRO-3. Rehearsed on CPUs, not measured on T4s.
#   launch/2xt4.sh train/sft.py --config recipes/a_qwen2.5_1.5b_to_0.5b/1_teacher.yaml
#   launch/2xt4.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/2xt4.yaml
flags=(--fp16 true --attn_implementation sdpa --max_per_device_train_batch_size 2 --gradient_checkpointing true --gpu_memory_gb 14.7)
distill_flags=(--teacher_deepspeed ds_configs/teacher_zero3.json --teacher_dtype float16)
plan_flags=(--tflops 65 --memory_gb_s 320 --link_gb_s 10)  # the vendor's numbers
generate_flags=(--dtype float16)
source "$(dirname "$0")/profile.sh"
