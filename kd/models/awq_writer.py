"""AWQ as a format of kd/models/packed_writer.py: rounding to nearest, without a search."""

from torch import Tensor

from kd.models.awq import pack
from kd.models.packed_writer import PackedFormat

PARTS = ("qweight", "qzeros", "scales")
SMALLEST = 2.0**-24  # the smallest positive float16


def awq_format(group_size: int) -> PackedFormat:
    """AutoAWQ's GEMM layout; `group_size` inputs share one scale and one zero point."""
    return PackedFormat(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
        },
        "modules_to_not_convert",
        lambda linear: linear.in_features % group_size == 0 and linear.out_features % 8 == 0,
        f"group_size: {group_size} divides none of the model's input sizes",
        lambda weight: dict(zip(PARTS, quantize(weight, group_size), strict=True)),
    )


def quantize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round each number of `weight`, (out, in), to the nearest of its group's 16 values.

    A zero stays zero.

    Returns:
        qweight (in, out / 8), qzeros (G, out / 8) and scales (G, out), with G = in / group_size.
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # (out, G, group_size)
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)  # (out, G)
    scales = ((high - low) / 15).clamp(min=SMALLEST).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = (groups / scales.float()[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15)
    return pack(numbers.flatten(1).T), pack(zeros.T), scales.T.contiguous()
