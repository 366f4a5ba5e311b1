"""Print the largest differences between the AWQ Triton kernel and torch as JSON.

TRITON_INTERPRET=1 python tests/jobs/awq_interpreted.py
"""

import json
import sys

import torch

from kd.models import awq, awq_kernel

CASES = {  # in, out, group
    "one block": (64, 64, 32),
    "a width that is no multiple of the block width": (96, 8 * 67, 48),
    "several groups": (256, 8 * 5, 128),
    "an odd group": (21, 8, 7),
}


def main() -> None:
    found = {}
    for name, (inputs, out, group) in CASES.items():
        torch.manual_seed(0)
        numbers = torch.randint(16, (inputs, out))
        zeros = torch.randint(16, (inputs // group, out))
        scales = torch.rand(inputs // group, out).half()
        packed = (awq.pack(numbers), awq.pack(zeros), scales)
        for dtype in (
            torch.float32,
            torch.float16,
        ):  # the interpreter lacks bfloat16
            ours = awq_kernel.dequantize(*packed, dtype)
            difference = ours - awq.dequantize(*packed, dtype)
            found[f"{name}, {dtype}"] = difference.abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.exit(0)
