#!/usr/bin/env bash
# Three stages in one command: hidden states, then logits, then the student's own answers.
#   recipes/f_qwen2.5_7b_to_1.5b_stages/train.sh launch/2xa100.sh
# Each stage starts from the model that the one before has left. The same call again skips what is finished and goes on
# from the last checkpoint of what is not; flags behind the profile go to every stage.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=${1:?usage: $0 launch/PROFILE.sh [flags of train/distill.py]}; shift
for stage in 1_hidden 2_logits 3_on_policy; do
    "$profile" train/distill.py --config "recipes/f_qwen2.5_7b_to_1.5b_stages/$stage.yaml" "$@"
    [[ -f runs/f/$stage/done.json ]] || { echo "stages: $stage has not come to its end; the same call goes on" >&2; exit 1; }
done
