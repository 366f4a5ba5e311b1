"""How a script ends: all ranks together, with a done marker, and without gloo's abort at exit."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from kd.credentials import without_credentials
from kd.distributed import barrier, is_initialized, rank, rank_prefix, world_size
from kd.run.folder_lock import release_locks
from kd.run.launcher import check_launcher, join_step, print_mistake
from kd.run.outcome import Stopped, report_outcome

PR_SET_PDEATHSIG = 1  # from Linux's sys/prctl.h
MISTAKE = "a mistake in the settings or the data: see the line that begins with error:"


def run(main: Callable[[], None]) -> None:
    """Call `main`, report a user's mistake in one line, and exit the process.

    Exit codes: 0 success, 1 unexpected error, 2 user's mistake (ValueError), 128 + N stopped by
    signal N.

    gloo's threads abort about one process in ten at interpreter exit, after all work is done, so a
    distributed process exits by os._exit. The done marker, written earlier, signals success.
    """
    exit_with_launcher()
    prefix = ""
    try:
        join_step()
        prefix = rank_prefix()
        print_start()
        check_launcher()
        main()
    except Stopped as stopped:
        barrier()  # rank 0 has written its files; srun ends all ranks when the first one exits
        if rank() == 0:
            print(stopped, flush=True)
            report_outcome("stopped", stopped.step)
        leave(128 + stopped.number)
    except KeyboardInterrupt:
        if rank() == 0:
            print(
                "stopped by SIGINT; what was saved is kept, and the same command goes on from it",
                flush=True,
            )
        leave(128 + signal.SIGINT)
    except ValueError as error:
        if os.environ.get("KD_TRACEBACK"):
            sys.stderr.write(without_credentials(traceback.format_exc()))
        write_launcher_error(MISTAKE)
        print_mistake(without_credentials(str(error)))
        report_outcome("failed")  # a restart would fail again
        leave(2)
    except Exception:
        trace = without_credentials(traceback.format_exc())
        write_launcher_error(trace)
        sys.stderr.write("".join(f"{prefix}{line}\n" for line in trace.split("\n")))
        leave(1)
    barrier()
    if rank() == 0:
        report_outcome("done")
    leave(0)


def print_start() -> None:
    """Say on rank 0 what was started: models and libraries take seconds to load."""
    if "--config" in sys.argv[:-1] and rank() == 0:
        recipe = sys.argv[sys.argv.index("--config") + 1]
        processes = f"{world_size()} processes" if world_size() > 1 else "one process"
        print(f"{sys.argv[0]}: reading {recipe}, {processes}", file=sys.stderr, flush=True)


def write_launcher_error(text: str) -> None:
    """Write an error to the file from which torchrun and accelerate report the first failure."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = {"message": {"message": text, "extraInfo": extra}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))


def exit_with_launcher() -> None:
    """Ask Linux to kill this process when its launcher is killed by SIGKILL.

    Otherwise the ranks would continue training with nobody to stop them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(code: int) -> None:
    """Flush the output and exit the process with `code`."""
    release_locks()
    sys.stdout.flush()
    sys.stderr.flush()
    if not is_initialized() and code == 0:
        return  # gloo has no threads here, so an ordinary exit is safe
    os._exit(code)
