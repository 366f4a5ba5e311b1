#!/usr/bin/env bash
# Machine: one H100 (80 GB), or NUM_PROCESSES=8 of them. bf16. The memory plan decides what is sharded.
# Rehearsed on CPUs, not measured on H100s.
#   launch/h100.sh train/distill.py --config recipes/d_qwen1.5_32b_to_14b/distill.yaml
#   NUM_PROCESSES=8 launch/h100.sh train/distill.py --config recipes/d_qwen1.5_32b_to_14b/distill.yaml
#   launch/h100.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/h100.yaml machine=h100
source "$(dirname "$0")/profile.sh"
