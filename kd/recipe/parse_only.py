"""Check a command without running it, as launch/slurm/pipeline.py does before it submits jobs.

KD_PARSE_ONLY lists the folders that earlier jobs will have written, separated by colons.
"""

import os
from pathlib import Path

VARIABLE = "KD_PARSE_ONLY"


def parses_only() -> bool:
    """Whether the script is to end after its settings have been checked."""
    return VARIABLE in os.environ


def will_exist(path: str) -> bool:
    """Whether an earlier job will have written `path`, or a folder that holds it."""
    folders = [Path(folder) for folder in os.environ.get(VARIABLE, "").split(":") if folder]
    return any(Path(path).is_relative_to(folder) for folder in folders)
