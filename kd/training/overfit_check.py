"""`--check`: ten steps on eight rows, which any working set-up must overfit."""

import math

from kd.settings.training import CHECK_STEPS

ROWS, MINIMUM_FALL = 8, 0.1


def check_rows(lengths: list[int], global_batch: int) -> list[int]:
    """The indices of the eight longest rows (to test the memory), repeated to fill a step."""
    longest = sorted(range(len(lengths)), key=lambda i: lengths[i])[-ROWS:]
    return (longest * math.ceil(global_batch / len(longest)))[:global_batch]


def report_check(history: list[dict], seconds: float) -> str:
    """Describe a check that passed. Raises ValueError if the loss did not fall by 10%."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    start, end = losses[0], min(losses[-3:])
    if not end < (1 - MINIMUM_FALL) * start:
        raise ValueError(
            f"check: the loss went from {start:.4g} to {end:.4g} in {len(losses)} steps on {ROWS} "
            f"rows; wanted a fall of {MINIMUM_FALL:.0%} or more. Check learning_rate, the trained "
            "weights, and the target tokens of these rows"
        )
    return (
        f"check: the loss fell from {start:.4g} to {end:.4g} in {CHECK_STEPS} steps on {ROWS} "
        f"rows, {seconds / CHECK_STEPS:.2g} s per step including the checkpoint. The set-up works"
    )
