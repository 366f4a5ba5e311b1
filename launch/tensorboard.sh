#!/usr/bin/env bash
# TensorBoard of all runs below a folder, on this machine's loopback alone; prints how to reach it from elsewhere.
#   launch/tensorboard.sh [runs/] [flags of tensorboard, such as --port 6007]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -d .venv ]] && PATH="$PWD/.venv/bin:$PATH"
runs=runs
if [[ $# -gt 0 && $1 != --* ]]; then runs=$1; shift; fi
[[ -d $runs ]] || { echo "$0: no folder $runs; wanted the output_dir of a run, or a folder of runs" >&2; exit 2; }
port=6006
for ((i = 1; i <= $#; i++)); do
    [[ ${!i} == --port=* ]] && port=${!i#--port=}
    if [[ ${!i} == --port ]]; then next=$((i + 1)); port=${!next:-6006}; fi
done
echo "here: http://localhost:$port    from elsewhere: ssh -N -L $port:localhost:$port $(whoami)@$(hostname)"
exec tensorboard --logdir "$runs" --host localhost --port "$port" "$@"
