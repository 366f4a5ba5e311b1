"""Synchronize the stop signal and non-finite flags across ranks at the end of a step."""

import torch
from transformers import TrainerCallback

from kd.distributed import all_max
from kd.run.signals import StopsOnSignal
from kd.training.non_finite import NonFinite


class RankSync(TrainerCallback):
    """Share two small numbers: the signal received, and whether a loss was not finite.

    The maximum over all ranks decides. One collective and one read from the device per step;
    nothing else in a step waits for the device.
    """

    def __init__(self, non_finite: NonFinite, stop: StopsOnSignal):
        self.non_finite, self.stop = non_finite, stop

    def on_step_end(self, args, state, control, **_) -> None:
        """Collective: agree on both numbers and act on them."""
        received = torch.tensor(self.stop.received, device=args.device)
        worst = torch.stack([received, self.non_finite.bad_batches().any().to(received)])
        number, bad = all_max(worst).tolist()
        self.non_finite.end_step(bool(bad), args, state.global_step)
        self.stop.end_step(number, control)
