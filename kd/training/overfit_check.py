"""`--check`: ten steps on eight rows, which any set-up that can learn must over-fit."""

import math

from kd.settings.training import CHECK_STEPS

ROWS, WANTED_FALL = 8, 0.1


def check_rows(lengths: list[int], global_batch: int) -> list[int]:
    """The eight longest rows, for memory is to be checked as well, as often as fills a step."""
    longest = sorted(range(len(lengths)), key=lambda i: lengths[i])[-ROWS:]
    return (longest * math.ceil(global_batch / len(longest)))[:global_batch]


def report_check(history: list[dict], seconds: float) -> str:
    """What to print of a check that went well; raises ValueError where the loss did not fall."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    start, end = losses[0], min(losses[-3:])
    if not end < (1 - WANTED_FALL) * start:
        raise ValueError(
            f"check: the loss went from {start:.4g} to {end:.4g} in {len(losses)} steps on {ROWS} rows; "
            f"wanted a fall of {WANTED_FALL:.0%} or more. Look at learning_rate, at what is trained, and "
            "at the target masks of these rows"
        )
    return (
        f"check: the loss fell from {start:.4g} to {end:.4g} in {CHECK_STEPS} steps on {ROWS} rows, "
        f"{seconds / CHECK_STEPS:.2g} s a step, the checkpoint included. This set-up trains"
    )
