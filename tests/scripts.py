"""Run the main() of a script in this process: faster than a new process for each call."""

import runpy

import pytest
from processes import ROOT

from kd.run.folder_lock import release_locks


def run_main(script: str, *flags: object) -> None:
    """Run main() of a script, such as train/merge.py, with command-line flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / script))["main"]()
        finally:
            release_locks()  # at the exit of a process, kd.run.exit does


def quantize(model: object, output_dir: object, group_size: int) -> None:
    """Write an AWQ checkpoint with train/quantize.py."""
    flags = ("--model", model, "--output_dir", output_dir, "--group_size", group_size)
    run_main("train/quantize.py", *flags)
