#!/usr/bin/env bash
# All tests on a fresh machine: sets up .venv by itself.
#   tests/run.sh [--all] [pytest arguments]
# --all adds what takes minutes: the quickstart, kills, a real SLURM, a browser, all commands of the README. Tests marked gpu run where there is a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
tier='not slow'
if [[ ${1:-} == --all ]]; then tier=''; shift; fi
source launch/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ruff check . && ruff format --check .
exec python -m pytest -m "$tier" --durations=15 "$@"
