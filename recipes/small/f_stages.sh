#!/usr/bin/env bash
# Small CPU variant of recipes/f_qwen2.5_7b_to_1.5b_stages/train.sh: hidden states, then logits, then on-policy.
#   recipes/small/f_stages.sh
# The same call again skips what is finished and goes on with what is not.
set -euo pipefail
cd "$(dirname "$0")/../.."
for stage in f_hidden f_logits f_on_policy; do
    launch/cpu.sh train/distill.py --config "recipes/small/$stage.yaml" "$@"
    [[ -f runs/small/$stage/done.json ]] || { echo "stages: $stage has not come to its end; the same call goes on" >&2; exit 1; }
done
