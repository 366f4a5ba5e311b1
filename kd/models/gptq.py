"""4-bit weights as GPTQ packs them, with or without act-order.

qweight int32 (in / 8, out): eight inputs per word; qzeros int32 (groups, out / 8): eight outputs
per word, each zero minus one in the first version of the format; scales (groups, out); g_idx (in,):
the group of each input. weight = (q - zero) * scale.
"""

import torch
from torch import Tensor, nn

from kd.gpu import triton_compiles
from kd.models.packed_linear import PackedLinear, meta_parameter, stored_dtype
from kd.models.tensor_files import TensorFiles

TILE = 2**24  # numbers that are dequantized at once


class GptqLinear(PackedLinear):
    """A Linear with GPTQ weights (arXiv 2210.17323)."""

    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles, settings: dict):
        super().__init__(linear, name, files)
        size = settings["group_size"]
        groups = 1 if size == -1 else -(-self.in_features // size)
        scales = stored_dtype(files, f"{name}.scales")
        self.qweight = meta_parameter((self.in_features // 8, self.out_features), torch.int32)
        self.qzeros = meta_parameter((groups, self.out_features // 8), torch.int32)
        self.scales = meta_parameter((groups, self.out_features), scales)
        self.g_idx = meta_parameter((self.in_features,), torch.int32)
        self.zeros_minus_one = settings.get("checkpoint_format", "gptq") == "gptq"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, (out, in), in `dtype`."""
        packed = (self.qweight, self.qzeros, self.scales, self.g_idx)
        return dequantize(*packed, self.zeros_minus_one, dtype).T


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    zeros_minus_one: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, (in, out), in `dtype`: computed in float32, where it is exact, and rounded once.

    Shapes: qweight (in / 8, out), qzeros (groups, out / 8), scales (groups, out), g_idx (in,).
    """
    if qweight.is_cuda and triton_compiles():
        from kd.models.packed_kernels import dequantize_gptq

        return dequantize_gptq(qweight, qzeros, scales, g_idx, zeros_minus_one, dtype)
    zeros = unpack(qzeros).flatten(1)  # (groups, out)
    if zeros_minus_one:
        zeros = (zeros + 1) & 15
    scales, out = scales.float(), scales.shape[1]
    weight = torch.empty(len(g_idx), out, dtype=dtype, device=qweight.device)
    step = max(1, TILE // (8 * out))  # words
    for start in range(0, len(qweight), step):
        # (words, out, 8) -> (words, 8, out) -> (inputs, out)
        numbers = unpack(qweight[start : start + step]).transpose(1, 2)
        rows = slice(8 * start, 8 * (start + len(numbers)))
        group = g_idx[rows].unflatten(0, (-1, 8))  # (words, 8)
        numbers = numbers.sub_(zeros[group])
        weight[rows].view_as(numbers).copy_(scales[group].mul_(numbers))
    return weight


def unpack(words: Tensor) -> Tensor:
    """Unpack int32 words (*) into int8 numbers 0..15 (*, 8)."""
    pairs = words[..., None].view(torch.int8)  # (*, 4), the lowest byte first
    return torch.stack([pairs & 15, (pairs >> 4) & 15], -1).flatten(-2)


def check_gptq(settings: dict, name: str) -> None:
    """Raise ValueError if quantization_config describes another layout."""
    form = settings.get("checkpoint_format", "gptq")
    if settings.get("bits") != 4 or form not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{name}: GPTQ with bits {settings.get('bits')}, checkpoint_format {form}; wanted "
            "bits 4 and gptq or gptq_v2"
        )
