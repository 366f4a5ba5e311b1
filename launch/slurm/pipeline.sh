#!/usr/bin/env bash
# Submit all steps of a distillation as SLURM jobs. Each waits for the one before; if one fails, the rest are cancelled.
# teacher -> (merge) -> answers -> students, a job array -> perplexity and agreement -> report
#   launch/slurm/pipeline.sh recipes/a_qwen2.5_1.5b_to_0.5b '[{"path": "heldout.jsonl"}]' --partition=gpu --gpus-per-node=2
# The folder has 1_teacher.yaml, 2_answers.yaml and one 3_*.yaml per student. The second argument is held-out rows for
# eval/, as JSON; all others are flags of sbatch. Prints one job per line. Run it again to resume: finished steps are skipped.
set -euo pipefail
[[ -f launch/slurm/train.sbatch ]] || { echo "pipeline: call it from the root of the repository; found $PWD" >&2; exit 2; }
recipes=${1:?wanted a folder with 1_teacher.yaml, 2_answers.yaml and 3_*.yaml} heldout=${2:?wanted held-out rows, as JSON}
shift 2
for file in "$recipes"/{1_teacher,2_answers}.yaml "$recipes"/3_*.yaml; do
    [[ -f $file ]] || { echo "pipeline: no $file" >&2; exit 2; }
done
value() { sed -n "s/^$2: *\([^ #]*\).*/\1/p" "$1"; }  # FILE KEY
submit() { # NAME DEPENDENCY [sbatch flags] -- SCRIPT [flags]
    local name=$1 after=(); [[ -z $2 ]] || after=(--dependency="afterok:$2" --kill-on-invalid-dep=yes); shift 2
    local job_flags=() log=runs/slurm/%x-%j.out; while [[ $1 != -- ]]; do job_flags+=("$1"); shift; done; shift
    [[ ${job_flags[*]} != *--array* ]] || log=runs/slurm/%x-%A_%a.out
    job=$(sbatch --parsable --job-name="$name" --output="$log" "${flags[@]}" "${after[@]}" "${job_flags[@]}" launch/slurm/train.sbatch "$@")
    echo "$name $job"
}
flags=("$@") job=''
mkdir -p runs/slurm  # a job whose log folder is missing fails silently
teacher=$(value "$recipes/1_teacher.yaml" output_dir) answering=$(value "$recipes/2_answers.yaml" model)
results=$(dirname "$teacher")/results name=$(basename "$recipes")

submit teacher '' -- train/sft.py --config "$recipes/1_teacher.yaml"
[[ $answering == "$teacher" ]] || submit merge "$job" --nodes=1 -- train/merge.py --adapter "$teacher" --output_dir "$answering"
submit answers "$job" -- train/generate.py --config "$recipes/2_answers.yaml"

lines=runs/slurm/$name.students students=()
for recipe in "$recipes"/3_*.yaml; do
    script=train/sft.py; [[ -z $(value "$recipe" teacher) ]] || script=train/distill.py
    printf '%q ' "$script" --config "$recipe"; echo
    students+=("$(value "$recipe" output_dir)")
done > "$lines"
submit students "$job" --array=1-${#students[@]} -- "@$lines"

models=(); for folder in "${students[@]}"; do models+=("$(basename "$folder")=$folder"); done
submit perplexity "$job" --nodes=1 -- eval/perplexity.py --models "teacher=$answering" "${models[@]}" --data "$heldout" --out_dir "$results"
submit agreement "$job" --nodes=1 -- eval/agreement.py --teacher "$answering" --models "${models[@]}" --data "$heldout" --out_dir "$results"
submit report "$job" --nodes=1 -- eval/report.py --results "$results" --runs "${students[@]}" --out "$results/report.md"
