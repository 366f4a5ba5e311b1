# Sourced from the root of the repository: use .venv where it exists, otherwise the active environment.
# DeepSpeed builds its operators at first use. In one folder for all environments of a user they would be
# rebuilt for each, and a build that was killed leaves a lock there, for which the next one waits.
if [[ -d .venv ]]; then
    export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}
fi
