"""Measure time, memory, losses and operators of the steps of benchmarks/step.py."""

import resource
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile
from transformers import Trainer, TrainerCallback

from kd.data.encoding import IGNORE_INDEX
from kd.training.step_times import StepTimes

WARM_UP = 1  # steps
KINDS = {  # substrings of operator and CUDA kernel names; the first match counts
    "communication": ("nccl", "c10d::", "gloo"),
    "attention": ("scaled_dot_product", "flash", "fmha"),
    "matrix products": ("aten::mm", "addmm", "bmm", "gemm", "cutlass", "nvjet", "xmma"),
    "softmax": ("softmax", "logsumexp"),
    "optimizer": ("adam", "foreach", "multi_tensor"),
}


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, or resident where it runs on a CPU.

    The same for every implementation; files that are mapped count, too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def operators(profiled: profile, seconds: float) -> dict[str, float]:
    """Seconds by kind of operator (on a GPU: of kernel), and the seconds in which none ran."""
    cuda = torch.cuda.is_available()
    found = dict.fromkeys([*KINDS, "other operators"], 0.0)
    for event in profiled.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        if not cuda and not event.key.startswith(("aten::", "c10d::", "gloo")):
            continue  # autograd nodes and other marks, whose time is Python and C++
        name = event.key.lower()
        kind = next((k for k, parts in KINDS.items() if any(part in name for part in parts)), None)
        found[kind or "other operators"] += spent / 1e6
    found["none (Python, idle)"] = seconds - sum(found.values())
    return found


class Watch(TrainerCallback):
    """Time, targets and losses of the steps after the first; no read from the device inside.

    For our trainer also the phases of these steps, and the operators of one more step.
    """

    def __init__(self, device: torch.device, accumulation: int, steps: int):
        self.device, self.accumulation, self.steps = device, accumulation, steps
        self.counts: list[tuple[Tensor, int]] = []  # (targets, positions) of each micro-batch
        self.losses: list[Tensor] = []  # one per micro-batch
        self.found: dict[str, Any] = {}
        self.times: StepTimes | None = None
        self.profile: profile | None = None

    def train(self, trainer: Trainer) -> None:
        compute_loss = trainer.compute_loss

        def noted_loss(model, inputs, *args, **kw):
            self.count(inputs)
            loss = compute_loss(model, inputs, *args, **kw)
            self.losses.append(loss.detach().clone())
            return loss

        trainer.compute_loss = noted_loss
        trainer.add_callback(self)  # added last, so that the step's other callbacks are timed
        trainer.train()

    def count(self, batch: dict[str, Tensor]) -> None:
        targets = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        self.counts.append((targets, batch["input_ids"].numel()))

    def on_step_end(self, args, state, control, **_) -> None:
        self.step_done(state.global_step)

    def step_done(self, step: int) -> None:
        if step < WARM_UP or WARM_UP < step < self.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begun if step > WARM_UP else 0.0
        if step == self.steps:
            peak = peak_bytes(self.device) / 2**20
            self.found |= {"seconds": seconds, "peak_mib": peak}
        if step == self.steps and self.times:
            phases, inside, steps = self.times.read()
            shares = {name: value / steps for name, value in phases.items()}
            shares["rest of the step"] = (inside - sum(phases.values())) / steps
            shares["between steps"] = (seconds - inside) / steps
            self.found["break_down_s"] = shares
        if step == self.steps and self.profile:
            self.profile.start()
        if step > self.steps:
            self.profile.stop()
            self.found["operators_s"] = operators(self.profile, seconds)
        if step == WARM_UP and self.times:
            self.times.read()
        self.begun = time.perf_counter()

    def metrics(self) -> dict[str, Any]:
        timed = self.counts[WARM_UP * self.accumulation : self.steps * self.accumulation]
        losses = torch.stack(self.losses[: self.steps * self.accumulation])
        return self.found | {
            "targets": sum(int(targets) for targets, _ in timed),
            "positions": sum(positions for _, positions in timed),
            "losses": losses.view(self.steps, self.accumulation).sum(1).tolist(),
        }
