#!/usr/bin/env bash
# Experiment D: the three students, the official chat model and the teacher in one report. MT-Bench, AlpacaEval 2.0 against
# the official model, agreement with the teacher on held-out conversations, speed and size.
#   recipes/d_qwen1.5_32b_to_14b/compare.sh launch/2xa100.sh my_data/judge
# The folder holds question.jsonl and reference_gpt-4.jsonl of MT-Bench, and alpaca_eval.json (805 instructions; CC BY-NC). Two
# optional arguments are a server and a judge; the default is gpt-4o at api.openai.com with the key in OPENAI_API_KEY. The
# grades take about 2 000 judge calls, the pairs 6 500 of one token; a rerun requests only what is missing. Reported by GPT-4o:
# distill > distill+sft and distill > sft; distill against the official model on AlpacaEval 52.17 : 47.83. Ours: not measured yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/activate.sh
profile=${1:?usage: $0 launch/PROFILE.sh FOLDER [SERVER [JUDGE]]} folder=${2:?wanted a folder with the questions}
judge=(--judge "${4:-gpt-4o}" --server "${3:-https://api.openai.com/v1}" --out_dir runs/d/results)
teacher=Qwen/Qwen1.5-32B-Chat-AWQ
students=(sft=runs/d/sft distill=runs/d/distill distill+sft=runs/d/distill_sft official=Qwen/Qwen1.5-14B-Chat)
heldout='[{"path": "HuggingFaceH4/ultrachat_200k", "split": "test_sft", "count": 500}]'
"$profile" eval/agreement.py --teacher "$teacher" --models "${students[@]}" --data "$heldout" --out_dir runs/d/results
"$profile" eval/judge.py "${judge[@]}" --benchmark mt_bench --questions "$folder/question.jsonl" \
    --references "$folder/reference_gpt-4.jsonl" --models "teacher=$teacher" "${students[@]}"
"$profile" eval/judge.py "${judge[@]}" --benchmark alpaca_eval --mode pair --baseline official \
    --questions "$folder/alpaca_eval.json" --models "teacher=$teacher" "${students[@]}"
python eval/speed.py --models "teacher=$teacher" "${students[@]}" --out_dir runs/d/results
exec python eval/report.py --results runs/d/results --runs runs/d/sft runs/d/distill runs/d/distill_sft \
    --expected_order distill distill+sft sft --trade_off "mt_bench grade" --out runs/d/report.md
