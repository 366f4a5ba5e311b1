"""Compile the loss kernel for GPUs of three generations, without one; print its code as JSON.

python tests/jobs/triton_compiled.py
"""

import itertools
import json
import re
import sys
from unittest.mock import patch

import torch
from gpu_code import Launches, gpu_code, widths

from kd.losses import triton_kernels
from kd.losses.head import Head, padded_width
from kd.settings.distillation import Objective

TOKENS = 256
QWEN = 151_665  # ids of the tokenizer, which is odd
HEAD = 152_064  # rows of its larger heads
DTYPES = {75: torch.float16, 80: torch.bfloat16, 90: torch.bfloat16}  # of gradients, by capability


def main() -> None:
    found = {}
    names = triton_kernels.KERNEL_DIVERGENCES
    plain = [(Objective(1.0, name), QWEN, {}) for name in names]
    plain += [(Objective(0.5, name, 2.0), QWEN, {}) for name in names]
    plain += [(Objective(0.5), HEAD, {}), (Objective(0.5), QWEN, {"real": True})]
    plain += [(Objective(0.5), QWEN, {"training": False})]
    plain += [(Objective(0.0), QWEN, {"teacher": False})]
    for capability, (objective, vocab_size, options) in itertools.product(DTYPES, plain):
        dtype = DTYPES[capability]
        code = gpu_code(KERNEL, launch(objective, vocab_size, dtype, **options), capability)
        loops = "\n".join(code.loops)
        found[f"sm_{capability}, {vocab_size} ids, {objective}, {options}"] = {
            "registers": code.registers,
            "spilled": code.spilled,
            "loops": len(code.loops),
            "exchanges": len(re.findall(r"\b(?:bar|barrier|shfl|redux)\.", loops)),
            "load": widths("ld", loops),
            "store": widths("st", loops),
        }
    json.dump(found, sys.stdout)


def launch(objective, vocab_size, dtype, real=False, training=True, teacher=True) -> tuple:
    """The arguments with which `tile_metrics` launches the kernel for a tile of the fused loss."""

    def logits(dtype=torch.float32):
        rows = torch.empty(TOKENS, padded_width(vocab_size), dtype=dtype, device="meta")
        return rows[:, :vocab_size]

    bias = torch.empty(vocab_size, dtype=dtype, device="meta") if real else None
    head = Head(torch.empty(0), bias, 0.5, 30.0 if real else None)
    scales = torch.empty(TOKENS, device="meta") if dtype == torch.float16 and training else None
    with patch.object(triton_kernels, "_tile_kernel", Launches()) as launches:
        triton_kernels.tile_metrics(
            logits(),
            logits() if teacher else None,
            torch.empty(TOKENS, dtype=torch.long, device="meta"),
            head,
            head if teacher else None,
            objective,
            logits(dtype) if training else None,
            scales,
        )
    return launches.calls[0]


KERNEL = triton_kernels._tile_kernel

if __name__ == "__main__":
    main()
