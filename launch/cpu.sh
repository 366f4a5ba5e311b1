#!/usr/bin/env bash
# Machine: two processes on any CPU, float32. For tests and first tries of the whole distributed path.
# Student under ZeRO-2; teacher sharded over both processes by its own ZeRO-3 engine.
#   launch/cpu.sh train/distill.py --config recipes/small/d_distill.yaml
#   launch/cpu.sh train/distill.py --help
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # more threads compete for the cores
export DS_ACCELERATOR=cpu  # DeepSpeed would look for one and warn that it found none
accelerate_config=accelerate_configs/cpu.yaml
flags=(--use_cpu true --max_per_device_train_batch_size 8)
distill_flags=(--teacher_deepspeed ds_configs/teacher_zero3.json)
plan_flags=()
generate_flags=(--dtype float32)
source "$(dirname "$0")/profile.sh"
