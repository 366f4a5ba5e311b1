"""NF4 as a format of kd/models/packed_writer.py: what bitsandbytes and Transformers read."""

import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor

from kd.models.load import nf4_config
from kd.models.packed_writer import PackedFormat


def nf4_format(compute_dtype: torch.dtype) -> PackedFormat:
    """The NF4 of `nf4_config`, stored in bytes, as checkpoints have it."""
    config = nf4_config(compute_dtype, storage=torch.uint8)
    return PackedFormat(
        config.to_dict(), "llm_int8_skip_modules", lambda linear: True, "no layer to pack;", pack
    )


def pack(weight: Tensor) -> dict[str, Tensor]:
    """Round a weight, (out, in), to NF4: the tensors of a bitsandbytes checkpoint by name."""
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": packed} | parts
