"""Log the metrics of two ranks with given sums and times, and write them to OUT/<rank>.json.

torchrun --nproc-per-node 2 tests/jobs/step_metrics.py OUT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kd.losses.metrics import PHASES, REPORTED
from kd.planning.throughput import MatrixWork
from kd.training import step_metrics as module

SHOWN = ["cross_entropy", "top1_agreement", "on_policy_divergence"]
WORK = MatrixWork(3.0, 5.0, 1000.0, 7.0, 2000.0)


def rank_sums(rank: int) -> dict[str, float]:
    """Return the sums of a rank over two micro-batches."""
    counts = (
        {"tokens": 10.0, "on_policy_tokens": 4.0}
        if rank
        else {"tokens": 30.0, "on_policy_tokens": 0.0}
    )
    sums = {
        "cross_entropy": 20.0 + 60.0 * rank,
        "top1_agreement": 6.0,
        "on_policy_divergence": 8.0 * rank,
    }
    return dict.fromkeys(REPORTED, 0.0) | counts | sums


def rank_times(rank: int) -> tuple[dict[str, float], float, int]:
    phases = dict.fromkeys(PHASES, 0.0) | {"student": 2.0 + rank, "loss": 1.0}
    return phases, 4.0 + 6.0 * rank, 2


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    metrics = module.StepMetrics(torch.device("cpu"), SHOWN, WORK)
    metrics.times.read = lambda: rank_times(rank)
    metrics.memory_bytes = lambda: (1 + rank) * 2**30
    found = []
    for _ in range(2):  # each log starts from zero
        for _ in range(2):
            half = torch.tensor([value / 2 for value in rank_sums(rank).values()])
            batch = {"tokens": torch.tensor([3, 4 + rank]), "input_ids": torch.zeros(2, 8)}
            metrics.add(half, batch)
        metrics.add_completions([[1] * (5 + rank)], rank)
        found.append(metrics.read() | {"pace": metrics.student_pace})
    found.append(metrics.mean_shares())
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
