#!/usr/bin/env bash
# Machine: two T4 (16 GB each, PCIe; Kaggle). fp16 with a dynamic loss scale, since a T4 has no bfloat16; SDPA attention.
# Teacher sharded over both GPUs by ZeRO-3. Rehearsed on CPUs, not measured on T4s.
#   launch/2xt4.sh train/sft.py --config recipes/a_qwen2.5_1.5b_to_0.5b/1_teacher.yaml
#   launch/2xt4.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/2xt4.yaml machine=t4
source "$(dirname "$0")/profile.sh"
