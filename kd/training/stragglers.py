"""A rank that is slower than the others slows all of them; this says which, and where it runs."""

import socket
import statistics
import time

from transformers import TrainerCallback

from kd.distributed import all_gather
from kd.training.step_metrics import Figures

LOST, LOGS_IN_A_ROW = 0.1, 3  # share of the time that waiting for one rank costs


class Pace(TrainerCallback):
    """Compares the ranks' time a token in the student's forward, which waits for nobody.

    Under ZeRO-3 the student's forward gathers its weights, and all ranks take the time of the slowest.
    """

    def __init__(self, figures: Figures) -> None:
        self.figures = figures
        self.logs = 0
        self.slowest: tuple[int, str] | None = None
        self.last_log = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Every rank comes here, after the log's figures have been read from the device."""
        if "loss" not in (logs or {}):
            return
        seconds, positions = self.figures.own_pace
        mine = (seconds / max(positions, 1), positions, socket.gethostname())
        passed, self.last_log = time.perf_counter() - self.last_log, time.perf_counter()
        slowest, times, lost = straggler(all_gather(mine), passed)
        if lost < LOST:
            self.logs, self.slowest = 0, None
            return
        self.logs = self.logs + 1 if slowest == self.slowest else 1
        self.slowest = slowest
        if self.logs == LOGS_IN_A_ROW and state.is_world_process_zero:
            print(
                f"rank {slowest[0]} on {slowest[1]} takes {times:.1f} x the others' time for a token; "
                f"waiting for it costs {lost:.0%}: look at its clock, temperature, other processes",
                flush=True,
            )


def straggler(
    ranks: list[tuple[float, int, str]], passed: float
) -> tuple[tuple[int, str], float, float]:
    """((rank, host) of the slowest, its time over that of the others, share of `passed` lost by it).

    `ranks`: seconds a token, tokens, host.
    """
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
    seconds, tokens, host = ranks[slowest]
    others = [s for rank, (s, _, _) in enumerate(ranks) if rank != slowest] or [seconds]
    usual = statistics.median(others)
    return (slowest, host), seconds / usual, (seconds - usual) * tokens / passed
