# Sourced by the machine profiles of this folder. Turns `launch/PROFILE.sh [options] SCRIPT [flags]` into one command.
# Options:
#   --dry-run   print the command that starts the same run without launch/start.py, instead of running it
#   --cpu       rehearse the profile with two CPU processes; only counts and precision are replaced
#   --torchrun  start with torchrun instead of accelerate launch, with the same DeepSpeed JSON
# NUM_PROCESSES in the environment replaces the profile's number of processes per node. With --torchrun, NNODES,
# NODE_RANK, MASTER_ADDR and MASTER_PORT make this one of several nodes (launch/slurm/train.sbatch).
# A profile sets accelerate_config, flags (training scripts), distill_flags, generate_flags and plan_flags.
# Relative paths of flags and recipes are those of the caller's folder; only the script may be one of the repository.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repository/launch/activate.sh"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# After a signal the ranks finish their step and save; torch alone would kill them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
accelerate_config=$repository/$accelerate_config
deepspeed_config=$repository/$(sed -n 's/^ *deepspeed_config_file: //p' "$accelerate_config")
dry_run='' torchrun='' start=(python "$repository/launch/start.py")
launcher=(accelerate launch --config_file "$accelerate_config" --deepspeed_config_file "$deepspeed_config")
launcher+=(--main_process_port 0)
[[ -n ${NUM_PROCESSES:-} ]] && launcher+=(--num_processes "$NUM_PROCESSES")
rehearsal=() processes=$(sed -n 's/^num_processes: //p' "$accelerate_config")
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --torchrun) torchrun=1 ;;
        --cpu)
            # accelerate's own --cpu would drop DeepSpeed, so a copy of the configuration sets it.
            mkdir -p runs/rehearsal
            sed "s|^use_cpu: .*|use_cpu: true|; s|^num_processes: .*|num_processes: 2|; s|ds_configs/|$repository/&|" \
                "$accelerate_config" > "runs/rehearsal/${accelerate_config##*/}"
            launcher[3]=runs/rehearsal/${accelerate_config##*/}
            export DS_ACCELERATOR=cpu
            rehearsal=(--use_cpu true --fp16 false --bf16 true) processes=2
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;;
        *) echo "$0: unknown option $1; wanted --dry-run, --cpu or --torchrun, then a script" >&2; exit 2 ;;
    esac
    shift
done
script=${1:-}
[[ -f $script || ! -f $repository/$script ]] || script=$repository/$script
[[ -f $script ]] || { echo "usage: $0 [--dry-run] [--cpu] [--torchrun] SCRIPT [flags]; no script '$script'" >&2; exit 2; }
shift
for flag in "$@"; do
    case $flag in -h | --help | --help-all) exec python "$script" "$flag" ;; esac  # needs no launcher
done
if [[ -n $torchrun ]]; then
    launcher=(torchrun --nproc-per-node "${NUM_PROCESSES:-$processes}")
    if [[ -n ${NNODES:-} ]]; then
        launcher+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    else
        launcher+=(--standalone)
    fi
    flags+=(--deepspeed "$deepspeed_config")
fi
distill_flags=("${distill_flags[@]/#ds_configs\//$repository/ds_configs/}")
case ${script#"$repository/"} in
    train/distill.py | train/cache_teacher.py) flags+=("${distill_flags[@]}" "${rehearsal[@]}") ;;
    train/sft.py) flags+=("${rehearsal[@]}") ;;
    train/plan.py)  # one plain process plans for all of them; the GPUs need not be here
        flags+=("${distill_flags[@]}" "${plan_flags[@]}" "${rehearsal[@]}")
        launcher=(python) start=() flags+=(--accelerate_config "$accelerate_config")
        flags+=(--num_processes $((${NUM_PROCESSES:-$processes} * ${NNODES:-1}))) ;;
    train/generate.py) flags=("${generate_flags[@]}") ;;
    *) flags=() ;;
esac
# The profile's flags come first and end with --profile_end: those of the command line override them, but no key may be
# given twice on the command line itself.
[[ ${#flags[@]} == 0 ]] || flags+=(--profile_end)
command=("${launcher[@]}" "$script" "${flags[@]}" "$@")
if [[ -n $dry_run ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
[[ -z ${start[*]} ]] || echo "$0: starting ${NUM_PROCESSES:-$processes} processes of $script" >&2
exec "${start[@]}" "${command[@]}"
