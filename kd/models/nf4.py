"""4-bit weights as bitsandbytes stores them: a code per number and a maximum per block.

weight (out * in / 2, 1) codes, absmax (blocks,). With double quantization the maxima are quantized,
too: absmax is uint8, and nested_absmax and nested_quant_map give its values.
"""

import json

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor, nn

from kd.models.packed_linear import PackedLinear, meta_parameter, stored_dtype
from kd.models.tensor_files import TensorFiles

STATE = "weight.quant_state.bitsandbytes__"  # JSON in a tensor of bytes


class Nf4Linear(PackedLinear):
    """A Linear with NF4 or FP4 weights (QLoRA, arXiv 2305.14314, section 3)."""

    stored_as = {name: f"weight.{name}" for name in ("absmax", "nested_absmax", "nested_quant_map")}

    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles, quant_type: str):
        super().__init__(linear, name, files)
        self.state = json.loads(bytes(files.read(f"{name}.{STATE}{quant_type}").tolist()))
        files.used.add(f"{name}.weight.quant_map")  # quant_type determines its values
        numel = self.in_features * self.out_features
        stored = stored_dtype(files, f"{name}.weight")
        self.weight = meta_parameter((-(-numel // (2 * stored.itemsize)), 1), stored)
        blocks = -(-numel // self.state["blocksize"])
        absmax = f"{name}.{self.stored_as['absmax']}"
        self.absmax = meta_parameter((blocks,), stored_dtype(files, absmax))
        self.nested_absmax = self.nested_quant_map = None
        if "nested_blocksize" in self.state:
            nested = -(-blocks // self.state["nested_blocksize"])
            self.nested_absmax = meta_parameter((nested,), torch.float32)
            self.nested_quant_map = meta_parameter((256,), torch.float32)
            offset = torch.tensor(self.state["nested_offset"])
            self.register_buffer("offset", offset, persistent=False)

    @classmethod
    def of(
        cls, linear: nn.Linear, name: str, files: TensorFiles, settings: dict
    ) -> "Nf4Linear | None":
        """The packed layer; None if the checkpoint left it unquantized (llm_int8_skip_modules)."""
        for quant_type in ("nf4", "fp4"):
            if f"{name}.{STATE}{quant_type}" in files.tensors:
                return cls(linear, name, files, quant_type)
        return None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, (out, in), in `dtype`."""
        state = QuantState(
            self.absmax.data,
            torch.Size((self.out_features, self.in_features)),
            blocksize=self.state["blocksize"],
            quant_type=self.state["quant_type"],
            dtype=dtype,
        )
        if self.nested_absmax is not None:
            state.nested, state.offset = True, self.offset
            state.state2 = QuantState(
                self.nested_absmax.data,
                code=self.nested_quant_map.data,
                blocksize=self.state["nested_blocksize"],
                dtype=torch.float32,
            )
        return dequantize_4bit(self.weight.data, state)
