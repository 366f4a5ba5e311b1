# Sourced from any folder: use .venv of the repository where it exists, otherwise the active environment.
# DeepSpeed builds its operators at first use. Each environment gets its own folder for them: environments that
# share one rebuild them for each other, and a killed build leaves a lock there that blocks the next one.
venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv
if [[ -d $venv ]]; then
    export PATH="$venv/bin:$PATH" TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}
fi
