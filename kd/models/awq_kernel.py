"""Dequantize AWQ weights on CUDA in one pass that reads every packed word once.

R rows (input features) and W words (8 output columns each) of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # upper limit; a power of two that divides the group: one row of zeros per block
WORDS = 64


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, (in, out), as kd.models.awq.dequantize computes it; shapes are given there."""
    inputs, words = qweight.shape
    group = inputs // len(scales)
    rows = min(ROWS, group & -group)
    weight = torch.empty(inputs, 8 * words, dtype=dtype, device=qweight.device)
    grid = (inputs // rows, triton.cdiv(words, WORDS))
    _dequantize_kernel[grid](
        qweight, qzeros, scales, weight, words, group, ROWS=rows, WORDS=WORDS, num_warps=4
    )
    return weight


@triton.jit
def _unpack(words):
    """Unpack words, (R, W), into numbers 0..15, (R, 8 W); column j is nibble 0 4 1 5 2 6 3 7."""
    column = tl.arange(0, 8)
    shifts = 4 * ((column >> 1) + 4 * (column & 1))
    numbers = (words[:, :, None] >> shifts[None, None, :]) & 15  # (R, W, 8)
    return tl.reshape(numbers, (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _dequantize_kernel(
    qweight, qzeros, scales, weight, words, group, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    place = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    columns = tl.program_id(1) * 8 * WORDS + tl.arange(0, 8 * WORDS)
    numbers = _unpack(
        tl.load(qweight + rows[:, None] * words + place[None, :], mask=(place < words)[None, :])
    )
    first = (tl.program_id(0) * ROWS // group).to(tl.int64)
    zeros = _unpack(
        tl.load(qzeros + first * words + place[None, :], mask=(place < words)[None, :])
    )  # (1, 8 W)
    inside = (columns < 8 * words)[None, :]
    scale = tl.load(scales + first * 8 * words + columns[None, :], mask=inside)
    value = (numbers - zeros).to(tl.float32) * scale.to(tl.float32)
    tl.store(
        weight + rows[:, None] * 8 * words + columns[None, :],
        value.to(weight.dtype.element_ty),
        mask=inside,
    )
