#!/usr/bin/env bash
# Run what needs a GPU: three sets, each in at most nine minutes. Needs PyTorch, Transformers, Accelerate and one NVIDIA GPU with
# 80 GB, no network. Not run on a GPU yet.
#   python benchmarks/wheels.py --python 3.12
#   benchmarks/gpu.sh --set first --out runs/gpu
#   benchmarks/gpu.sh --set second --out runs/gpu
#   benchmarks/gpu.sh --set third --out runs/gpu
# The first command runs where there is a network and downloads benchmarks/wheels; copy that folder to the machine with the
# GPU. The others write SET.json, SET.txt and SET.log into runs/gpu. The sets, by their value: tests, loss, and a step beside TRL;
# a step of 32B to 14B, float16, two ranks, and the quickstart; memory beside the plan, and smaller steps.
# WHEELS names another folder of wheels. Without wheels, the installed packages are used.
set -euo pipefail
began=$(date +%s)
cd "$(dirname "$0")/.."
wheels=${WHEELS:-benchmarks/wheels}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$site" "$wheels"/*.whl || echo "gpu.sh: some wheels could not be installed" >&2
fi
mkdir -p "$site/bin"  # launch files call `python`, which may be another one than python3
printf '#!/bin/sh\nexec %q "$@"\n' "$(command -v python3)" > "$site/bin/python"
chmod +x "$site/bin/python"
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python3 benchmarks/gpu.py --began "$began" "$@"
