"""How a script ends: together, with a done marker, and without gloo's abort at interpreter exit."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

DONE = "done.json"


def run(main: Callable[[], None]) -> None:
    """Call `main`, report a user's mistake in one line, and leave the process.

    gloo's threads abort one process in ten at interpreter exit after all its work, so a finished
    process leaves by os._exit; success is the done marker, written before.
    """
    try:
        main()
    except ValueError as error:
        if os.environ.get("KD_TRACEBACK"):
            raise
        where = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{where}error: {error}", file=sys.stderr)
        leave(2)
    if dist.is_initialized():
        dist.barrier()
    leave(0)


def leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if not dist.is_initialized() and code == 0:
        return  # an ordinary exit: nothing of gloo is alive
    os._exit(code)


def is_done(output_dir: str) -> bool:
    return (Path(output_dir) / DONE).is_file()


def mark_done(output_dir: str, summary: dict) -> None:
    """Written last, whole or not at all."""
    temporary = Path(output_dir) / f"{DONE}.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.rename(Path(output_dir) / DONE)
