"""How a script ends: together, with a done marker, and without gloo's abort at interpreter exit."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from kd.run.signals import Stopped, report_outcome

DONE = "done.json"
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def run(main: Callable[[], None]) -> None:
    """Call `main`, report a user's mistake in one line, and leave the process.

    gloo's threads abort one process in ten at interpreter exit after all its work, so a finished
    process leaves by os._exit; success is the done marker, written before. A launcher prints the
    first failure of all its processes last: it reads that from a file.
    """
    die_with_the_launcher()
    where = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        main()
    except Stopped as stopped:
        if dist.is_initialized():
            dist.barrier()  # what rank 0 wrote is there; srun ends all at the first that leaves
        if first():
            print(stopped, flush=True)
            report_outcome("stopped")
        leave(128 + stopped.number)
    except ValueError as error:
        if os.environ.get("KD_TRACEBACK"):
            raise
        tell_launcher(error, f"{type(error).__name__}: {error}")
        print(f"{where}error: {error}", file=sys.stderr)
        report_outcome("failed")  # starting again would not help
        leave(2)
    except Exception as error:
        tell_launcher(error, traceback.format_exc())
        sys.stderr.write("".join(f"{where}{line}\n" for line in traceback.format_exc().split("\n")))
        leave(1)
    if dist.is_initialized():
        dist.barrier()
    if first():
        report_outcome("done")
    leave(0)


def tell_launcher(error: Exception, text: str) -> None:
    """In the file in which torchrun and accelerate launch look for the reason of a failure."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = {"message": {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))


def die_with_the_launcher() -> None:
    """Where the launcher is killed -9, its processes would train on, with nobody to stop them."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


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
