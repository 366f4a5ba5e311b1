#!/usr/bin/env bash
# Experiment C, step 3: parent, student as inherited, and students after training, in one report: zero-shot accuracy on
# boolq, winogrande and piqa (lm-evaluation-harness), what is lost against the parent, tests of pairs, speed and size.
#   recipes/c_open_llama_3b_to_6_blocks/3_compare.sh launch/h100.sh
# Measured already is not measured again; students that were not trained are left out. Reported finding: at equal
# resources inheritance alone (text) is better than distillation. Ours: not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=${1:?usage: $0 launch/PROFILE.sh}
models=(parent=openlm-research/open_llama_3b_v2) runs=()
for name in inherited measured text text-time distill distill-hidden; do
    if [[ -f runs/c/$name/done.json ]]; then models+=("$name=runs/c/$name") runs+=("runs/c/$name"); fi
done
"$profile" eval/benchmarks.py --models "${models[@]}" --tasks boolq winogrande piqa --num_fewshot 0 --out_dir runs/c/results
python eval/speed.py --models "${models[@]}" --out_dir runs/c/results
exec python eval/report.py --results runs/c/results --runs "${runs[@]}" --teacher parent --start inherited \
    --trade_off "piqa acc" --out runs/c/report.md
