#!/usr/bin/env bash
# TensorBoard for all runs below a folder (default runs/ of the caller's folder), on the loopback interface only. Prints the ssh line that reaches
# it from another machine. Flags after the folder go to tensorboard.
#   launch/tensorboard.sh
#   launch/tensorboard.sh runs/quickstart --port 6007
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/activate.sh"
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
