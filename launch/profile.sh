# Sourced by the profiles of this folder; turns `launch/PROFILE.sh [options] SCRIPT [flags]` into one command.
#   --dry-run   print the command instead of running it
#   --cpu       rehearse the profile with two CPU processes: only counts and precision are replaced
# NUM_PROCESSES=8 in the environment replaces the profile's number of processes.
# A profile sets: accelerate_config, flags (both training scripts), distill_flags, generate_flags.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -d .venv ]] && PATH="$PWD/.venv/bin:$PATH"
dry_run='' launcher=(accelerate launch --config_file "$accelerate_config" --main_process_port 0)
[[ -n ${NUM_PROCESSES:-} ]] && launcher+=(--num_processes "$NUM_PROCESSES")
rehearsal=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --cpu)
            # accelerate's own --cpu would drop DeepSpeed, so a copy of the configuration says it.
            mkdir -p runs/rehearsal
            sed 's/^use_cpu: .*/use_cpu: true/; s/^num_processes: .*/num_processes: 2/' \
                "$accelerate_config" > "runs/rehearsal/${accelerate_config##*/}"
            launcher[3]=runs/rehearsal/${accelerate_config##*/}
            rehearsal=(--use_cpu true --fp16 false --bf16 true)
            export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} ;;
        *) echo "$0: unknown option $1; wanted --dry-run or --cpu, then a script" >&2; exit 2 ;;
    esac
    shift
done
[[ -f ${1:-} ]] || { echo "usage: $0 [--dry-run] [--cpu] SCRIPT [flags]; no script '${1:-}'" >&2; exit 2; }
script=$1; shift
case $script in
    train/distill.py) flags+=("${distill_flags[@]}" "${rehearsal[@]}") ;;
    train/sft.py) flags+=("${rehearsal[@]}") ;;
    train/generate.py) flags=("${generate_flags[@]}") ;;
    *) flags=() ;;
esac
# The profile's flags stand in front: what the command line gives comes later, and wins.
command=("${launcher[@]}" "$script" "${flags[@]}" "$@")
if [[ -n $dry_run ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
exec "${command[@]}"
