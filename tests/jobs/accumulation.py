"""Accumulate known gradients in DeepSpeed's engine and save the errors of the result.

torchrun --nproc-per-node 2 tests/jobs/accumulation.py WORK

The gradient of a micro-batch is its input, in bfloat16 and therefore exact. So the error of the
accumulated gradient is that of the sums over micro-batches and ranks alone. Writes
WORK/errors.json: the root mean square of the error, relative to that of the gradient, for every
configuration.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from kd.distributed import rank, world_size
from kd.run.exit import leave

STEPS, WIDTH = 16, 64
CONFIGS = ("ds_configs/student_zero2.json", "ds_configs/student_zero3.json")
DTYPES = ("data_types", "communication_data_type")  # without them, DeepSpeed sums in bfloat16


class Product(nn.Module):
    """The sum of weight * input, whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.layer(torch.eye(WIDTH, dtype=inputs.dtype)).T.float() * inputs.float()).sum()


def main() -> None:
    work = Path(sys.argv[1])
    deepspeed.init_distributed("gloo")
    found = {}
    for path in CONFIGS:
        shipped = json.loads(Path(path).read_text())
        default = {key: value for key, value in shipped.items() if key not in DTYPES}
        for name, config in (("shipped", shipped), ("default", default)):
            found[f"{Path(path).stem} {name}"] = error(config)
    if rank() == 0:
        (work / "errors.json").write_text(json.dumps(found))
    leave(0)


def error(config: dict) -> float:
    """The error of a gradient that was accumulated over STEPS micro-batches and all ranks."""
    sizes = {
        key: WIDTH * WIDTH for key, value in config["zero_optimization"].items() if value == "auto"
    }
    engine, *_ = deepspeed.initialize(
        model=(model := Product()),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
        config=config
        | {
            "zero_optimization": config["zero_optimization"] | sizes,
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "gradient_clipping": 0.0,
            "train_batch_size": STEPS * world_size(),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": STEPS,
        },
    )
    inputs = torch.randn(
        world_size(), STEPS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)
    )
    inputs = (inputs + 1).bfloat16()  # gradients of one batch point in similar directions
    for step in range(STEPS):
        engine.backward(engine(inputs[rank(), step]))
        if engine.is_gradient_accumulation_boundary():
            gradient = safe_get_full_grad(engine.module.layer.weight).double()
        engine.step()
    exact = inputs.double().mean((0, 1))
    return ((gradient - exact).square().mean() / exact.square().mean()).sqrt().item()


if __name__ == "__main__":
    main()
