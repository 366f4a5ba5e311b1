"""4-bit weights in AutoAWQ's GEMM layout.

qweight int32 (in, out / 8), qzeros int32 (in / group, out / 8), scales (in / group, out);
weight = (q - zero) * scale.
"""

import torch
from torch import Tensor, nn

from kd.gpu import triton_compiles
from kd.models.packed_linear import PackedLinear, meta_parameter, stored_dtype
from kd.models.tensor_files import TensorFiles

SHIFTS = [0, 16, 4, 20, 8, 24, 12, 28]  # of the eight columns in a word
TILE = 2**22  # numbers that are unpacked at once on a CPU


class AwqLinear(PackedLinear):
    """A Linear with AWQ weights (arXiv 2306.00978)."""

    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles, settings: dict):
        super().__init__(linear, name, files)
        size = settings["group_size"]
        groups = 1 if size == -1 else self.in_features // size
        words = self.out_features // 8
        scales = stored_dtype(files, f"{name}.scales")
        self.qweight = meta_parameter((self.in_features, words), torch.int32)
        self.qzeros = meta_parameter((groups, words), torch.int32)
        self.scales = meta_parameter((groups, self.out_features), scales)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, (out, in), in `dtype`."""
        return dequantize(self.qweight, self.qzeros, self.scales, dtype).T


def check_awq(settings: dict, name: str) -> None:
    """Raise ValueError if quantization_config describes another layout."""
    expected = {"bits": 4, "version": "gemm", "zero_point": True}
    found = {
        "bits": settings.get("bits", settings.get("w_bit")),
        "version": settings.get("version", settings.get("format", "gemm")).lower(),
        "zero_point": settings.get("zero_point", True),
    }
    if found != expected or not isinstance(settings.get("group_size"), int):
        raise ValueError(
            f"{name}: AWQ with {found}, group_size {settings.get('group_size')}; wanted {expected} "
            "and an integer group_size"
        )


def unpack(words: Tensor) -> Tensor:
    """Unpack int32 words, (R, W), into int32 numbers 0..15, (R, 8 W)."""
    shifts = torch.tensor(SHIFTS, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 15).flatten(1)


def pack(numbers: Tensor) -> Tensor:
    """Pack numbers 0..15, (R, 8 W), into int32 words, (R, W): the inverse of `unpack`."""
    shifts = torch.tensor(SHIFTS, dtype=torch.int32, device=numbers.device)
    words = numbers.to(torch.int32).unflatten(1, (-1, 8)) << shifts  # (R, W, 8), disjoint bits
    return words.sum(-1, dtype=torch.int32)


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, (in, out), in `dtype`: computed in float32, where it is exact, and rounded once.

    Shapes: qweight (in, out / 8), qzeros (in / group, out / 8), scales (in / group, out).
    """
    if qweight.is_cuda and triton_compiles():
        from kd.models.packed_kernels import dequantize_awq

        return dequantize_awq(qweight, qzeros, scales, dtype)
    (groups, out), inputs = scales.shape, len(qweight)
    zeros, size = unpack(qzeros)[:, None], inputs // groups  # (groups, 1, out)
    weight = torch.empty(groups, size, out, dtype=dtype, device=qweight.device)
    step = max(1, TILE // (size * out))  # groups
    for start in range(0, groups, step):
        tile = slice(start, start + step)
        numbers = unpack(qweight[start * size : (start + step) * size]).unflatten(0, (-1, size))
        weight[tile] = (numbers - zeros[tile]) * scales[tile, None].float()
    return weight.view(inputs, out)
