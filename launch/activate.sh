# Sourced from any folder: use .venv of the repository where it exists, otherwise the active environment.
venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
if [[ -d $venv ]]; then
    export PATH="$venv/bin:$PATH"
fi
