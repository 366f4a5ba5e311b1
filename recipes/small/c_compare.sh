#!/usr/bin/env bash
# Small CPU variant of recipes/c_open_llama_3b_to_6_blocks/3_compare.sh: the small students of experiment C, local tasks.
#   recipes/small/c_compare.sh '{"boolq": "boolq.jsonl", "winogrande": "winogrande.jsonl", "piqa": "piqa.jsonl"}'
# The rows have the fields of those on the hub. First train the students:
#   python train/inherit.py --config recipes/small/c_inherit.yaml
#   launch/cpu.sh train/sft.py --config recipes/small/c_text.yaml
#   launch/cpu.sh train/distill.py --config recipes/small/c_distill.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/activate.sh
task_data=${1:?usage: $0 \{TASK: FILE\} as JSON}
heldout='[{"path": "runs/quickstart/data/text_heldout.jsonl", "count": 40}]'
students=(inherited=runs/small/c_inherit text=runs/small/c_text distill=runs/small/c_distill)
models=(parent=data/quickstart/teacher "${students[@]}") results=(--out_dir runs/small/c_results)
launch/cpu.sh eval/benchmarks.py --models "${models[@]}" --tasks boolq winogrande piqa --task_data "$task_data" \
    --num_fewshot 0 "${results[@]}"
launch/cpu.sh eval/agreement.py --teacher data/quickstart/teacher --teacher_name parent --models "${students[@]}" \
    --data "$heldout" --max_length 256 "${results[@]}"
python eval/speed.py --models "${models[@]}" --prompt_tokens 32 --new_tokens 8 --repeats 2 "${results[@]}"
exec python eval/report.py --results runs/small/c_results --runs runs/small/c_text runs/small/c_distill \
    --teacher parent --start inherited --trade_off "piqa acc" --out runs/small/c_report.md
