#!/usr/bin/env bash
# All that needs a GPU, in at most nine minutes: PyTorch, one NVIDIA GPU and this folder, no network.
# Not yet run on one.
#   python benchmarks/wheels.py               where there is a network; then carry benchmarks/wheels along
#   benchmarks/gpu.sh --out DIR               writes DIR/gpu.json, DIR/table.txt, DIR/log.txt
# WHEELS names another folder of wheels; without one the installed packages serve.
set -euo pipefail
began=$(date +%s)
cd "$(dirname "$0")/.."
wheels=${WHEELS:-benchmarks/wheels}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" > /dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --target "$site" "$wheels"/*.whl || echo "gpu.sh: not all wheels could be installed" >&2
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python3 benchmarks/gpu.py --began "$began" "$@"
