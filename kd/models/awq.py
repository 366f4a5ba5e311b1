"""Weights of four bits as AutoAWQ's GEMM layout packs them.

qweight int32 (in, out / 8), qzeros int32 (in / group, out / 8), scales (in / group, out);
weight = (q - zero) * scale.
"""

import functools
import importlib.util

import torch
from torch import Tensor, nn

from kd.models.packed_linear import PackedLinear, frozen, stored_dtype
from kd.models.tensor_files import TensorFiles

SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]  # of the eight columns in a word
UNPACKED = 2**22  # numbers at one time on a CPU


class AwqLinear(PackedLinear):
    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles, settings: dict):
        super().__init__(linear, name, files)
        group = settings["group_size"]
        groups = 1 if group == -1 else self.in_features // group
        words = self.out_features // 8
        self.qweight = frozen((self.in_features, words), torch.int32)
        self.qzeros = frozen((groups, words), torch.int32)
        self.scales = frozen((groups, self.out_features), stored_dtype(files, f"{name}.scales"))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.qweight, self.qzeros, self.scales, dtype).T


def awq_layer(linear: nn.Linear, name: str, files: TensorFiles, settings: dict) -> AwqLinear | None:
    """None for a Linear that the checkpoint left as it was (modules_to_not_convert)."""
    if f"{name}.qweight" not in files.tensors:
        return None
    return AwqLinear(linear, name, files, settings)


def check_awq(settings: dict, name: str) -> None:
    """Raises ValueError where quantization_config is of another layout."""
    wanted = {"bits": 4, "version": "gemm", "zero_point": True}
    found = {
        "bits": settings.get("bits", settings.get("w_bit")),
        "version": settings.get("version", settings.get("format", "gemm")).lower(),
        "zero_point": settings.get("zero_point", True),
    }
    if found != wanted or not isinstance(settings.get("group_size"), int):
        raise ValueError(
            f"{name}: AWQ with {found}, group_size {settings.get('group_size')}; wanted {wanted} "
            "and a group_size"
        )


def unpack(words: Tensor) -> Tensor:
    """(R, W) int32 -> (R, 8 W) int32 numbers 0..15."""
    shifts = torch.tensor(SHIFTS, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 15).flatten(1)


def pack(numbers: Tensor) -> Tensor:
    """(R, 8 W) numbers 0..15 -> (R, W) int32; the inverse of `unpack`."""
    shifts = torch.tensor(SHIFTS, dtype=torch.int32, device=numbers.device)
    words = numbers.to(torch.int32).unflatten(1, (-1, 8)) << shifts  # (R, W, 8), no bit twice
    return words.sum(-1, dtype=torch.int32)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(in, out) in `dtype`: formed in float32, where it is exact, and rounded once."""
    if qweight.is_cuda and has_triton():
        from kd.models import awq_kernel

        return awq_kernel.dequantize(qweight, qzeros, scales, dtype)
    (groups, out), inputs = scales.shape, len(qweight)
    zeros, size = unpack(qzeros)[:, None], inputs // groups  # (groups, 1, out)
    weight = torch.empty(groups, size, out, dtype=dtype, device=qweight.device)
    step = max(1, UNPACKED // (size * out))  # groups
    for start in range(0, groups, step):
        some = slice(start, start + step)
        numbers = unpack(qweight[start * size : (start + step) * size]).unflatten(0, (-1, size))
        weight[some] = (numbers - zeros[some]) * scales[some, None].float()
    return weight.view(inputs, out)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


if __name__ == "__main__":  # in a file of its own, since it reads models, which are read by this
    from kd.models.awq_writer import main
    from kd.run.exit import run

    run(main)
