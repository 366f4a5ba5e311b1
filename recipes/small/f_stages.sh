#!/usr/bin/env bash
# Small CPU variant of recipes/f_qwen2.5_7b_to_1.5b_stages/train.sh: hidden states, then distributions, then on-policy.
#   recipes/small/f_stages.sh
# Run it again to resume: finished stages are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/activate.sh
for stage in f_hidden f_logits f_on_policy; do
    launch/cpu.sh train/distill.py --config "recipes/small/$stage.yaml" "$@"
    [[ -f runs/small/$stage/done.json ]] || { echo "stages: $stage is not finished; run the same command again to resume" >&2; exit 1; }
done
