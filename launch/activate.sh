# Sourced from the root of the repository: use .venv where it exists, otherwise the active environment.
# DeepSpeed builds its operators at first use. Each environment gets its own folder for them: environments that
# share one rebuild them for each other, and a killed build leaves a lock there that blocks the next one.
if [[ -d .venv ]]; then
    export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}
fi
