# Sourced by the launch files of this folder. Turns `launch/PROFILE.sh [options] SCRIPT [flags]` into one command.
# Options:
#   --dry-run   print the command that starts the same run without launch/start.py, instead of running it
#   --cpu       rehearse the machine with two CPU processes; only device, precision and their number differ
#   --torchrun  start with torchrun instead of accelerate launch
# NUM_PROCESSES in the environment replaces the number of processes per node. NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT make this one of several nodes.
# A launch file names its accelerate_config and its machine (launch/machines). They only matter for what is started:
# the script reads the machine file of the devices that it finds, however it was started.
# Relative paths of flags and recipes are those of the caller's folder; only the script may be one of the repository.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$repository/launch/activate.sh"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# After a signal the ranks finish their step and save; torch alone would kill them after 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
dry_run='' torchrun='' rehearsal='' start=(python "$repository/launch/start.py") flags=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --torchrun) torchrun=1 ;;
        --cpu) rehearsal=1 accelerate_config=accelerate_configs/cpu.yaml ;;
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
accelerate_config=$repository/$accelerate_config nodes=${NNODES:-1}
processes=${NUM_PROCESSES:-$(sed -n 's/^num_processes: //p' "$accelerate_config")}
if grep -q '^use_cpu: true' "$accelerate_config"; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # more threads compete for the cores
fi
if [[ -n $torchrun ]]; then
    launcher=(torchrun --nproc-per-node "$processes")
    if [[ $nodes -gt 1 ]]; then
        launcher+=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    else
        launcher+=(--standalone)
    fi
else
    launcher=(accelerate launch --config_file "$accelerate_config" --num_processes $((processes * nodes)))
    if [[ $nodes -gt 1 ]]; then
        launcher+=(--num_machines "$nodes" --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR")
        launcher+=(--main_process_port "$MASTER_PORT")
    else
        launcher+=(--main_process_port 0)
    fi
fi
name=${script#"$repository/"}
case $name in
    train/sft.py | train/distill.py | train/cache_teacher.py)
        [[ -z $rehearsal ]] || flags=(--machine "$machine")
        [[ -z $rehearsal || " $*" == *" --precision"* ]] || flags+=(--precision bfloat16) ;;
    train/plan.py)  # one plain process plans for all of them; the GPUs need not be here
        launcher=(python) start=() flags=(--machine "$machine" --num_processes $((processes * nodes)) --num_machines "$nodes") ;;
esac
command=("${launcher[@]}" "$script" "${flags[@]}" "$@")
if [[ -n $dry_run ]]; then printf '%q ' "${command[@]}"; echo; exit; fi
[[ -z ${start[*]} ]] || echo "$0: starting $processes processes of $script" >&2
exec "${start[@]}" "${command[@]}"
