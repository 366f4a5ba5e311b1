#!/usr/bin/env bash
# Run the tests. Sets up .venv on a fresh machine.
#   tests/run.sh
#   tests/run.sh --all
#   tests/run.sh tests/losses
# --all adds what takes minutes: the quickstart, kills, a real SLURM, a browser, benchmarks, recipes, and all commands of the
# documentation.
# Other arguments go to pytest: `-n 8` starts eight test processes instead of two. Tests marked gpu run where there is a GPU,
# with one process, so that no other test uses its memory.
set -euo pipefail
cd "$(dirname "$0")/.."
tier='not slow'
if [[ ${1:-} == --all ]]; then tier=''; shift; fi
source launch/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check .
ruff format --check .
workers=2
if nvidia-smi -L >/dev/null 2>&1; then workers=0; fi
exec python -m pytest -m "$tier" -n "$workers" --durations=15 "$@"
