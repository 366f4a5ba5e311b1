#!/usr/bin/env bash
# Run the tests. Sets up .venv on a fresh machine.
#   tests/run.sh
#   tests/run.sh --all
#   tests/run.sh tests/losses
# --all adds what takes minutes: the quickstart, kills, a real SLURM, a browser, benchmarks, recipes, and all commands of the
# documentation.
# Other arguments go to pytest. Tests marked gpu run where there is a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
tier='not slow'
if [[ ${1:-} == --all ]]; then tier=''; shift; fi
source launch/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
exec python -m pytest -m "$tier" --durations=15 "$@"
