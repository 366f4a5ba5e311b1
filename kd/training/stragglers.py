"""Name a rank that is slower than the others and so slows down the whole job."""

import socket
import statistics
import time

from transformers import TrainerCallback

from kd.distributed import all_gather, print_rank0
from kd.training.step_metrics import StepMetrics

LOST_SHARE = 0.1  # share of the time spent waiting for one rank, from which it is reported
LOGS_IN_A_ROW = 3


class StragglerMonitor(TrainerCallback):
    """Compare the ranks' time per token in the student's forward, which waits for no other rank.

    Under ZeRO-3 the forward gathers weights, so all ranks take the time of the slowest, and no
    straggler shows.
    """

    def __init__(self, metrics: StepMetrics) -> None:
        self.metrics = metrics
        self.logs = 0
        self.slowest: tuple[int, str] | None = None
        self.last_log = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Collective, after the metrics of a log have been read: report a persistent straggler."""
        if "loss" not in (logs or {}):
            return
        seconds, positions = self.metrics.student_pace
        mine = (seconds / max(positions, 1), positions, socket.gethostname())
        elapsed, self.last_log = time.perf_counter() - self.last_log, time.perf_counter()
        slowest, ratio, lost = straggler(all_gather(mine), elapsed)
        if lost < LOST_SHARE:
            self.logs, self.slowest = 0, None
            return
        self.logs = self.logs + 1 if slowest == self.slowest else 1
        self.slowest = slowest
        if self.logs == LOGS_IN_A_ROW:
            rank, host = slowest
            print_rank0(
                f"rank {rank} on {host} takes {ratio:.1f} x the others' time per token. "
                f"Waiting for it costs {lost:.0%} of the time. Check its clock rate, its "
                "temperature and other processes"
            )


def straggler(
    ranks: list[tuple[float, int, str]], elapsed: float
) -> tuple[tuple[int, str], float, float]:
    """((rank, host) of the slowest, its time over the others' median, share of time lost to it).

    `ranks` holds seconds per token, tokens and host of each rank; `elapsed` is in seconds.
    """
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
    seconds, tokens, host = ranks[slowest]
    others = [s for rank, (s, _, _) in enumerate(ranks) if rank != slowest] or [seconds]
    usual = statistics.median(others)
    return (slowest, host), seconds / usual, (seconds - usual) * tokens / elapsed
