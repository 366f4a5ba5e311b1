#!/usr/bin/env bash
# Train and measure three students, on a fresh machine. Needs two CPU cores, no GPU and no model hub.
# Teacher: data/quickstart/teacher (5.5 M); student: three of its six layers. Result: distill beats distill+sft beats sft in
# KL to the teacher (README.md). Time after the installation: under 8 minutes on two cores with AVX-512 and bfloat16, several times as
# long without.
#   launch/quickstart.sh
#   launch/quickstart.sh --teacher HuggingFaceTB/SmolLM2-360M-Instruct --student HuggingFaceTB/SmolLM2-135M
# --gpu uses one GPU instead of the CPU; not run on one yet. SETUP=none in the environment installs nothing.
# Run it again to resume. SEEDS="0" in the environment trains one seed instead of three.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."  # the recipes of the quickstart name folders of the repository
teacher=data/quickstart/teacher student='' launch=launch/cpu.sh
while [[ $# -gt 0 ]]; do
    case $1 in
        --teacher) teacher=${2:?--teacher needs a hub name or a folder}; shift 2 ;;
        --student) student=${2:?--student needs a hub name or a folder}; shift 2 ;;
        --gpu) launch=launch/h100.sh; shift ;;
        *) echo "quickstart: unknown option $1; wanted --teacher, --student or --gpu" >&2; exit 2 ;;
    esac
done
if [[ $caller != "$PWD" ]]; then  # folders of the caller
    [[ ! -d $caller/$teacher ]] || teacher=$caller/$teacher
    [[ -z $student || ! -d $caller/$student ]] || student=$caller/$student
fi
if [[ ${SETUP:-} = none ]]; then source launch/activate.sh; else source launch/setup.sh; fi
out=runs/quickstart started=$SECONDS
lanes=$(env -u OMP_NUM_THREADS nproc)  # nproc would report OMP_NUM_THREADS
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out/logs" "$out/results"
# Finished steps are skipped, so one folder must not mix two pairs of models.
if [[ "$(cat "$out/models" 2>/dev/null || echo "$teacher $student")" != "$teacher $student" ]]; then
    echo "quickstart: $out holds the run of $(cat "$out/models"); move it away, then run this again" >&2; exit 2
fi
echo "$teacher $student" > "$out/models"
precision=()
if [[ $launch = launch/cpu.sh ]]; then
    precision=(--use_cpu true)
    if grep -q avx512_bf16 /proc/cpuinfo 2>/dev/null; then precision+=(--precision bfloat16); fi  # twice as fast on this hardware
fi

# Models of the hub have more to lose than the shipped ones: lower learning rates.
teacher_rate=() student_rate=()
[[ $teacher = data/quickstart/teacher ]] || teacher_rate=(--learning_rate 2e-4)
[[ -z $student ]] || student_rate=(--learning_rate 5e-5)

step() { printf '\n[%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$1"; }

step "1/7 data: docstrings of the installed packages"
[[ -f $out/data/chat_heldout.jsonl ]] || python data/quickstart/docstrings.py --out_dir "$out/data"

step "2/7 teacher: QLoRA on text and chat; student: half of its layers"
"$launch" train/sft.py --config recipes/quickstart/1_teacher.yaml --model "$teacher" "${precision[@]}" "${teacher_rate[@]}"
python train/merge.py --adapter "$out/teacher" --output_dir "$out/teacher-merged"
template=(--chat_template "$out/teacher-merged/chat_template.jinja")  # a base model may have none

if [[ -z $student ]]; then  # half of the layers of the teacher before its fine-tuning
    student=$out/student
    [[ -f $student/done.json ]] || python train/inherit.py --parent "$teacher" --layers 0 2 5 --output_dir "$student"
fi

step "3/7 the teacher answers under a hidden system prompt"
"$launch" train/generate.py --config recipes/quickstart/2_answers.yaml

step "4/7 students: sft, distill, distill+sft, each from seeds ${SEEDS:=0 1 2}; logs in $out/logs"
train_student() { # NAME SEED
    local script=train/distill.py key=--student run=$1-seed$2
    if [[ $1 = sft ]]; then script=train/sft.py key=--model; fi
    python "$script" --config "recipes/quickstart/3_${1/+/_}.yaml" "$key" "$student" --seed "$2" \
        --output_dir "$out/students/$run" --disable_tqdm true "${common[@]}" >"$out/logs/$run.log" 2>&1 ||
        { tail -n 20 "$out/logs/$run.log" >&2; return 1; }
    echo "$run"
}
export -f train_student; export out student; common=("${precision[@]}" "${student_rate[@]}" "${template[@]}")
declare -p common > "$out/logs/common"
runs=() models=("teacher=$out/teacher-merged" "start=$student")
for seed in $SEEDS; do for name in distill distill+sft sft; do
    runs+=("$name $seed"); models+=("$name-seed$seed=$out/students/$name-seed$seed")
done; done
printf '%s\n' "${runs[@]}" |
    xargs -P "$lanes" -L 1 bash -c 'source "$out/logs/common"; train_student "$@" || exit 255' _ |
    tqdm --total "${#runs[@]}" --unit student >/dev/null

step "5/7 held-out perplexity, and agreement with the teacher"
heldout="[{\"path\": \"$out/data/text_heldout.jsonl\", \"count\": 150}, {\"path\": \"$out/data/chat_heldout.jsonl\", \"count\": 400}]"
"$launch" eval/agreement.py --teacher "$out/teacher-merged" --models "${models[@]:1}" --data "$heldout" \
    --max_length 256 "${template[@]}" --out_dir "$out/results"  # also writes what eval/perplexity.py measures

step "6/7 answers side by side"
python eval/answers.py --models "${models[@]:0:5}" --data "[{\"path\": \"$out/data/chat_heldout.jsonl\"}]" \
    --count 8 "${template[@]}" --out "$out/results/answers.jsonl"

step "7/7 report"
python eval/report.py --results "$out/results" --runs "$out/teacher" "$out"/students/* \
    --samples "$out/results/answers.jsonl" --expected_order distill distill+sft sft --out "$out/report.md"
step "done. TensorBoard: tensorboard --logdir $out"
