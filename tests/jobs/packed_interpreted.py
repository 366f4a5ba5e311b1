"""Print the largest differences between the kernels of packed weights and torch as JSON.

TRITON_INTERPRET=1 python tests/jobs/packed_interpreted.py
"""

import json
import sys

import torch
from torch import Tensor

from kd.models import awq, gptq, packed_kernels

AWQ = {  # in, out, group
    "one block": (64, 64, 32),
    "a width that is no multiple of the block width": (96, 8 * 67, 48),
    "several groups": (256, 8 * 5, 128),
    "an odd group": (21, 8, 7),
}
GPTQ = {
    "one block": (64, 64, 32),
    "rows and columns that are no multiples of the block's": (88, 8 * 19, 16),
    "one group": (256, 8 * 5, 256),
    "a last group that is smaller": (72, 24, 32),
}


def awq_tensors(inputs: int, out: int, group: int) -> tuple[Tensor, ...]:
    """Random qweight, qzeros and scales."""
    numbers, zeros = torch.randint(16, (inputs, out)), torch.randint(16, (inputs // group, out))
    return awq.pack(numbers), awq.pack(zeros), torch.rand(inputs // group, out).half()


def gptq_tensors(inputs: int, out: int, group: int, act_order: bool) -> tuple[Tensor, ...]:
    """Random qweight, qzeros, scales and g_idx; every bit of a word may be set."""
    groups = -(-inputs // group)
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
        for shape in ((inputs // 8, out), (groups, out // 8))
    )
    g_idx = torch.arange(inputs, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs)]
    return qweight, qzeros, torch.rand(groups, out).half(), g_idx


def main() -> None:
    found = {}

    def compare(key: str, kernel, oracle, packed: tuple, *options) -> None:
        for dtype in (torch.float32, torch.float16):  # the interpreter lacks bfloat16
            difference = kernel(*packed, *options, dtype) - oracle(*packed, *options, dtype)
            found[f"{key}, {options}, {dtype}"] = difference.abs().max().item()

    torch.manual_seed(0)
    for name, shape in AWQ.items():
        packed = awq_tensors(*shape)
        compare(f"AWQ: {name}", packed_kernels.dequantize_awq, awq.dequantize, packed)
    for name, shape in GPTQ.items():
        for act_order in (False, True):
            packed, key = gptq_tensors(*shape, act_order), f"GPTQ: {name}, act-order {act_order}"
            for minus_one in (False, True):
                compare(key, packed_kernels.dequantize_gptq, gptq.dequantize, packed, minus_one)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.exit(0)
