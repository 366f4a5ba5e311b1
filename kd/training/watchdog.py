"""A run in which a process hangs ends itself, and says which process, on which machine, and where."""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback

import torch.distributed as dist
from transformers import TrainerCallback

from kd.run.exit import tell_launcher

FRAMES = 6  # innermost ones, of the stack that is shown


class Watchdog(TrainerCallback):
    """Ends the process where nothing has moved for `ddp_timeout` seconds.

    A collective waits for a hung rank as long as its own time-out, and then blames the wrong rank.
    Every process tells the others that it lives, so the silent one has a name.
    """

    def __init__(self) -> None:
        self.moved = time.monotonic()
        self.step = 0
        self.over = threading.Event()

    def on_train_begin(self, args, state, control, **_) -> None:
        self.beat()
        self.over.clear()
        thread = threading.Thread(target=self.watch, args=(float(args.ddp_timeout),), daemon=True)
        thread.start()

    def on_train_end(self, args, state, control, **_) -> None:
        self.over.set()

    def beat(self) -> None:
        """Called wherever the training moves; costs nothing."""
        self.moved = time.monotonic()

    def on_step_end(self, args, state, control, **_) -> None:
        self.step = state.global_step
        self.beat()

    def on_save(self, args, state, control, **_) -> None:
        self.beat()

    def watch(self, timeout: float) -> None:
        pause = min(5.0, timeout / 4)
        store = shared_store(timeout=pause)
        while not self.over.wait(pause):
            with contextlib.suppress(RuntimeError):  # it ends with the process that serves it
                tell_alive(store)
            if time.monotonic() - self.moved > timeout:
                self.end(timeout, silent_ranks(store, 3 * pause))

    def end(self, timeout: float, silent: str) -> None:
        stack = sys._current_frames()[threading.main_thread().ident]
        frames = traceback.format_list(traceback.extract_stack(stack)[-FRAMES:])
        error = TimeoutError(
            f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()} has not moved for "
            f"{timeout:.0f} s (ddp_timeout) after step {self.step}.{silent}\nIt stands at:\n"
            + "".join(frames)
        )
        tell_launcher(error, f"TimeoutError: {error}")
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def shared_store(timeout: float) -> dist.Store | None:
    """A connection of its own to the store of the process group: the main one may be waiting."""
    if not dist.is_initialized():
        return None
    from datetime import timedelta

    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=timeout))
    return store


def tell_alive(store: dist.Store | None) -> None:
    if store:
        who = f"{time.time()} {socket.gethostname()} {os.getpid()}"
        store.set(f"alive/{dist.get_rank()}", who)


def silent_ranks(store: dist.Store | None, seconds: float) -> str:
    """A sentence on the ranks that have not been heard of for `seconds`."""
    if not store:
        return ""
    try:
        keys = [f"alive/{rank}" for rank in range(dist.get_world_size())]
        told = [store.get(key).decode().split() for key in keys if store.check([key])]
    except RuntimeError:
        return " The process that all of them meet at is gone."
    late = [
        f"pid {pid} on {host} ({time.time() - float(when):.0f} s)"
        for when, host, pid in told
        if time.time() - float(when) > seconds
    ]
    if not late:
        return " All ranks are alive: look for the one that stands in no collective."
    return f" Not heard of since: {', '.join(late)}."
