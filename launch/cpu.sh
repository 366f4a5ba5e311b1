#!/usr/bin/env bash
# Machine: two processes on any CPU, float32. For tests and first tries of the whole distributed path.
# Student under ZeRO-2; teacher sharded over both processes by its own ZeRO-3 engine.
#   launch/cpu.sh train/distill.py --config recipes/small/d_distill.yaml
#   launch/cpu.sh train/distill.py --help
set -euo pipefail
accelerate_config=accelerate_configs/cpu.yaml machine=cpu
source "$(dirname "$0")/profile.sh"
