#!/usr/bin/env bash
# Experiment C, step 3: the parent, the student as inherited, and the students after training, in one report. Zero-shot
# accuracy on boolq, winogrande and piqa (lm-evaluation-harness), accuracy lost against the parent, paired tests, speed and size.
#   recipes/c_open_llama_3b_to_6_blocks/3_compare.sh launch/h100.sh
# Existing measurements are reused; students that were not trained are left out. Reported: at equal resources inheritance
# and text beat distillation. Ours: not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/activate.sh
profile=${1:?usage: $0 launch/PROFILE.sh}
models=(parent=openlm-research/open_llama_3b_v2) runs=()
for name in inherited measured text text-time distill distill-hidden; do
    if [[ -f runs/c/$name/done.json ]]; then models+=("$name=runs/c/$name") runs+=("runs/c/$name"); fi
done
"$profile" eval/benchmarks.py --models "${models[@]}" --tasks boolq winogrande piqa --num_fewshot 0 --out_dir runs/c/results
python eval/speed.py --models "${models[@]}" --out_dir runs/c/results
exec python eval/report.py --results runs/c/results --runs "${runs[@]}" --teacher parent --start inherited \
    --trade_off "piqa acc" --out runs/c/report.md
