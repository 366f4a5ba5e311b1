"""Dequantize AWQ and GPTQ weights on CUDA in one pass that reads every packed word once.

R rows of a block and W words (8 columns each); a word of GPTQ's qweight holds 8 rows instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

AWQ_ROWS = 32  # upper limit; a power of two that divides the group: one row of zeros per block
AWQ_WORDS = 64
GPTQ_ROWS = 32  # of the weight: a multiple of 8
GPTQ_WORDS = 16  # of zeros


def dequantize_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, (in, out), as kd.models.awq.dequantize computes it; shapes are given there."""
    inputs, words = qweight.shape
    group = inputs // len(scales)
    rows = min(AWQ_ROWS, group & -group)
    weight = torch.empty(inputs, 8 * words, dtype=dtype, device=qweight.device)
    grid = (inputs // rows, triton.cdiv(words, AWQ_WORDS))
    awq_kernel[grid](
        qweight, qzeros, scales, weight, words, group, ROWS=rows, WORDS=AWQ_WORDS, num_warps=4
    )
    return weight


def dequantize_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    zeros_minus_one: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The weight, (in, out), as kd.models.gptq.dequantize computes it; shapes are given there."""
    inputs, words = len(g_idx), qzeros.shape[1]
    weight = torch.empty(inputs, 8 * words, dtype=dtype, device=qweight.device)
    grid = (triton.cdiv(inputs, GPTQ_ROWS), triton.cdiv(words, GPTQ_WORDS))
    gptq_kernel[grid](
        qweight, qzeros, scales, g_idx, weight, inputs, words, MINUS_ONE=zeros_minus_one,
        ROWS=GPTQ_ROWS, WORDS=GPTQ_WORDS, num_warps=4,
    )  # fmt: skip
    return weight


@triton.jit
def _unpack_columns(words, INTERLEAVED: tl.constexpr):
    """Unpack words, (R, W), into numbers 0..15, (R, 8 W).

    Column j of a word is nibble j, or nibble 0 4 1 5 2 6 3 7 if INTERLEAVED.
    """
    column = tl.arange(0, 8)
    if INTERLEAVED:
        column = (column >> 1) + 4 * (column & 1)
    numbers = (words[:, :, None] >> (4 * column)[None, None, :]) & 15  # (R, W, 8)
    return tl.reshape(numbers, (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _store(numbers, zeros, scale, address, inside):
    """Store (numbers - zeros) * scale, (R, 8 W): exact in float32, and rounded once."""
    value = (numbers - zeros).to(tl.float32) * scale.to(tl.float32)
    tl.store(address, value.to(address.dtype.element_ty), mask=inside)


@triton.jit
def awq_kernel(
    qweight, qzeros, scales, weight, words, group, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Dequantize ROWS rows of one group and 8 WORDS columns."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    place = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    columns = tl.program_id(1) * 8 * WORDS + tl.arange(0, 8 * WORDS)
    known, inside = (place < words)[None, :], (columns < 8 * words)[None, :]
    packed = tl.load(qweight + rows[:, None] * words + place[None, :], mask=known)
    first = (tl.program_id(0) * ROWS // group).to(tl.int64)
    zeros = tl.load(qzeros + first * words + place[None, :], mask=known)  # (1, W)
    scale = tl.load(scales + first * 8 * words + columns[None, :], mask=inside)
    address = weight + rows[:, None] * 8 * words + columns[None, :]
    _store(_unpack_columns(packed, True), _unpack_columns(zeros, True), scale, address, inside)


@triton.jit
def gptq_kernel(
    qweight, qzeros, scales, g_idx, weight, inputs, words,
    MINUS_ONE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Dequantize ROWS rows, each of any group, and 8 WORDS columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    columns = tl.program_id(1) * 8 * WORDS + tl.arange(0, 8 * WORDS)
    known = (rows < inputs)[:, None] & (place < words)[None, :]
    inside = (rows < inputs)[:, None] & (columns < 8 * words)[None, :]
    group = tl.load(g_idx + rows, mask=rows < inputs, other=0).to(tl.int64)[:, None]
    zeros = _unpack_columns(tl.load(qzeros + group * words + place[None, :], mask=known), False)
    if MINUS_ONE:
        zeros = (zeros + 1) & 15
    scale = tl.load(scales + group * 8 * words + columns[None, :], mask=inside)
    # The 8 rows of a word load the same one: once from memory, then from the cache.
    word = (rows // 8).to(tl.int64)[:, None]
    packed = tl.load(qweight + word * 8 * words + columns[None, :], mask=inside)
    numbers = (packed >> (4 * (rows % 8))[:, None]) & 15
    address = weight + rows.to(tl.int64)[:, None] * 8 * words + columns[None, :]
    _store(numbers, zeros, scale, address, inside)
