#!/usr/bin/env bash
# Three stages in one command: hidden states, then distributions, then the student's own answers.
#   recipes/f_qwen2.5_7b_to_1.5b_stages/train.sh launch/2xa100.sh
# Each stage starts from the model of the one before. Run it again to resume: finished stages are skipped. Flags after the
# profile go to every stage.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/activate.sh
profile=${1:?usage: $0 launch/PROFILE.sh [flags of train/distill.py]}; shift
for stage in 1_hidden 2_logits 3_on_policy; do
    "$profile" train/distill.py --config "recipes/f_qwen2.5_7b_to_1.5b_stages/$stage.yaml" "$@"
    [[ -f runs/f/$stage/done.json ]] || { echo "stages: $stage is not finished; run the same command again to resume" >&2; exit 1; }
done
