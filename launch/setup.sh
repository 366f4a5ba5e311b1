#!/usr/bin/env bash
# Create .venv and install everything that the scripts and the tests need. Installs again only if the requirements changed.
# quickstart.sh and tests/run.sh source this file. By hand, from the root of the repository:
#   bash launch/setup.sh
# On a machine with an NVIDIA GPU, torch comes from PyTorch's index for a CUDA version that suits the driver (kd/gpu.py), and
# Liger's kernels are installed, too.
# TORCH_INDEX in the environment names another one, for example a mirror: TORCH_INDEX=https://mirror/whl/cu126 bash launch/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "setup: $1" >&2; exit 1; }
for name in python3 python3.13 python3.12 python3.11 python3.10; do
    python=$(command -v "$name") || continue
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' && break || python=''
done
[[ -n ${python:-} ]] || fail "found $(python3 --version 2>&1); wanted Python 3.10 or newer: install it (apt-get install python3.11 python3.11-venv, or conda create -n kd python=3.11)"
command -v c++ >/dev/null || command -v g++ >/dev/null ||
    fail "no C++ compiler, and DeepSpeed compiles its operators at first use: apt-get install g++ (or conda install gxx)"
index=$("$python" -m kd.gpu index) || fail "torch: no build for this GPU (see above)"
wanted="$(cat requirements.txt pyproject.toml | cksum)${index:+ $index}"
if [[ $(cat .venv/installed 2>/dev/null) != "$wanted" ]]; then
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv ||
        fail "no venv module: apt-get install python3-venv, then run this again"
    echo "setup: installing into .venv${index:+, torch from $index}"
    if [[ -n $index ]]; then  # pip would keep a build for the CPU or for another CUDA version
        .venv/bin/python -m pip uninstall -q -y --disable-pip-version-check torch
        .venv/bin/python -m pip install -q --disable-pip-version-check --index-url "$index" "$(grep '^torch[<>=]' requirements.txt)"
    fi
    .venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt -e ".[test${index:+,fast}]"
    .venv/bin/python -m kd.gpu check || fail "torch cannot use the GPU (see above)"
    echo "$wanted" > .venv/installed
fi
source launch/activate.sh
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then echo "setup: .venv is ready; in your shell: source .venv/bin/activate"; fi
