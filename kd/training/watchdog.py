"""End a run in which a process hangs, and name the process, its machine and the line of code."""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist
from transformers import TrainerCallback

from kd.distributed import is_initialized, rank, world_size
from kd.run.exit import write_launcher_error

FRAMES = 6  # innermost stack frames that are printed
NAME = "watchdog"  # of its thread
GRACE = 60  # seconds by which a collective outlasts the watchdog, which alone knows the silent rank


class Watchdog(TrainerCallback):
    """End the process if the training makes no progress for `ddp_timeout` seconds.

    A collective waits for a hung rank until its own timeout and then blames the wrong rank. Here
    every process reports regularly that it is alive, so the silent one can be named.
    """

    def __init__(self) -> None:
        self.moved = time.monotonic()
        self.step = 0
        self.over = threading.Event()

    def on_train_begin(self, args, state, control, **_) -> None:
        """Start the thread that watches."""
        self.beat()
        self.over.clear()
        thread = threading.Thread(
            target=self.watch, args=(float(args.ddp_timeout),), name=NAME, daemon=True
        )
        thread.start()

    def on_train_end(self, args, state, control, **_) -> None:
        """End the thread."""
        self.over.set()

    def beat(self) -> None:
        """Record progress; costs nothing."""
        self.moved = time.monotonic()

    def on_step_end(self, args, state, control, **_) -> None:
        """Record a finished step."""
        self.step = state.global_step
        self.beat()

    def on_save(self, args, state, control, **_) -> None:
        """Record a finished checkpoint."""
        self.beat()

    def watch(self, timeout: float) -> None:
        """Report that this process is alive, until it is stuck for `timeout` seconds."""
        pause = min(5.0, timeout / 4)
        store = shared_store(timeout=pause)
        while not self.over.wait(pause):
            with contextlib.suppress(RuntimeError):  # the store's process may have ended
                report_alive(store)
            if time.monotonic() - self.moved > timeout:
                self.end(timeout, describe_silent_ranks(store, 3 * pause))

    def end(self, timeout: float, silent: str) -> None:
        """Print where this process is stuck and exit with code 1."""
        stack = sys._current_frames()[threading.main_thread().ident]
        frames = traceback.format_list(traceback.extract_stack(stack)[-FRAMES:])
        error = TimeoutError(
            f"rank {rank()} on {socket.gethostname()} has made no progress for {timeout:.0f} s "
            f"(ddp_timeout) after step {self.step}.{silent}\nIt is stuck at:\n" + "".join(frames)
        )
        write_launcher_error(f"TimeoutError: {error}")
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def collective_timeout(ddp_timeout: int) -> timedelta:
    """How long a collective waits: longer than the watchdog, which looks every few seconds."""
    return timedelta(seconds=ddp_timeout + GRACE)


def shared_store(timeout: float) -> dist.Store | None:
    """A new connection to the process group's store; the main connection may be blocked.

    `timeout` is in seconds. None without a process group.
    """
    if not is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=timeout))
    return store


def report_alive(store: dist.Store | None) -> None:
    """Write the time, host and process id of this rank to the store."""
    if store:
        store.set(f"alive/{rank()}", f"{time.time()} {socket.gethostname()} {os.getpid()}")


def describe_silent_ranks(store: dist.Store | None, seconds: float) -> str:
    """A sentence that names the ranks that have not reported for `seconds`."""
    if not store:
        return ""
    try:
        keys = [f"alive/{i}" for i in range(world_size())]
        reports = [store.get(key).decode().split() for key in keys if store.check([key])]
    except RuntimeError:
        return " The process that serves the ranks' store has exited."
    late = [
        f"pid {pid} on {host} ({time.time() - float(when):.0f} s)"
        for when, host, pid in reports
        if time.time() - float(when) > seconds
    ]
    if not late:
        return " All ranks are alive: look for the one that is not in a collective."
    return f" No report from: {', '.join(late)}."
