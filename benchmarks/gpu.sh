#!/usr/bin/env bash
# Run everything that needs a GPU in at most nine minutes. Needs PyTorch and one NVIDIA GPU, no network.
# Not run on a GPU yet.
#   python benchmarks/wheels.py --python 3.12
#   benchmarks/gpu.sh --out runs/gpu
# The first command runs where there is a network and downloads benchmarks/wheels; copy that folder to the machine with the
# GPU. The second writes gpu.json, table.txt and log.txt into runs/gpu.
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
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python3 benchmarks/gpu.py --began "$began" "$@"
