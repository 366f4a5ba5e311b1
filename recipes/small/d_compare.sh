#!/usr/bin/env bash
# Small CPU variant of recipes/d_qwen1.5_32b_to_14b/compare.sh: the small students of experiment D.
#   recipes/small/d_compare.sh my_data/judge http://localhost:8000/v1 small
# The folder holds question.jsonl, reference_gpt-4.jsonl and alpaca_eval.json. The other two arguments are a server and the
# judge's name on it. First train the students:
#   launch/cpu.sh train/sft.py --config recipes/small/d_sft.yaml
#   launch/cpu.sh train/distill.py --config recipes/small/d_distill.yaml
#   launch/cpu.sh train/distill.py --config recipes/small/d_distill_sft.yaml
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/activate.sh
folder=${1:?usage: $0 FOLDER SERVER JUDGE} server=${2:?wanted the URL of a server} name=${3:?wanted a model of the server}
judge=(--judge "$name" --server "$server" --max_new_tokens 24 --out_dir runs/small/d_results)
teacher=data/quickstart/teacher
students=(sft=runs/small/d_sft distill=runs/small/d_distill distill+sft=runs/small/d_distill_sft start=data/quickstart/student)
heldout='[{"path": "runs/quickstart/data/chat_heldout.jsonl", "count": 40}]'
launch/cpu.sh eval/agreement.py --teacher "$teacher" --models "${students[@]}" --data "$heldout" --max_length 256 \
    --out_dir runs/small/d_results
launch/cpu.sh eval/judge.py "${judge[@]}" --benchmark mt_bench --questions "$folder/question.jsonl" \
    --references "$folder/reference_gpt-4.jsonl" --models "teacher=$teacher" "${students[@]}"
launch/cpu.sh eval/judge.py "${judge[@]}" --benchmark alpaca_eval --mode pair --baseline start \
    --questions "$folder/alpaca_eval.json" --models "teacher=$teacher" "${students[@]}"
python eval/speed.py --models "teacher=$teacher" "${students[@]}" --prompt_tokens 32 --new_tokens 8 --repeats 2 \
    --out_dir runs/small/d_results
exec python eval/report.py --results runs/small/d_results --runs runs/small/d_sft runs/small/d_distill \
    runs/small/d_distill_sft --trade_off "mt_bench grade" --out runs/small/d_report.md
