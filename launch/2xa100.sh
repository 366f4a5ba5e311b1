#!/usr/bin/env bash
# Machine: two A100 (80 or 40 GB each, NVLink). bf16. Teacher sharded over both GPUs by ZeRO-3; student under ZeRO-2, or ZeRO-3
# if only that fits. Rehearsed on CPUs, not measured on A100s.
#   launch/2xa100.sh train/distill.py --config recipes/d_qwen1.5_32b_to_14b/distill.yaml
#   launch/2xa100.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/2xa100.yaml machine=a100
source "$(dirname "$0")/profile.sh"
