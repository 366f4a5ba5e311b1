"""What every rank must know at the end of a step: one collective, and one read of the device."""

import torch
from transformers import TrainerCallback

from kd.distributed import all_max
from kd.run.signals import StopsOnSignal
from kd.training.non_finite import NonFinite


class RankSync(TrainerCallback):
    """Tells all ranks whether any of them had a signal, and whether any had no finite loss.

    Both are small numbers of which the largest counts. Nothing else of a step waits for the device.
    """

    def __init__(self, non_finite: NonFinite, stop: StopsOnSignal):
        self.non_finite, self.stop = non_finite, stop

    def on_step_end(self, args, state, control, **_) -> None:
        received = torch.tensor(self.stop.received, device=args.device)
        worst = torch.stack([received, self.non_finite.bad_batches().any().to(received)])
        number, bad = all_max(worst).tolist()
        self.non_finite.end_step(bool(bad), args, state.global_step)
        self.stop.end_step(number, control)
