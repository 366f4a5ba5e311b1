"""The base class of Linear layers whose frozen weights are packed into 4 bits."""

import torch
from torch import Tensor, nn

from kd.models.tensor_files import TensorFiles


class PackedLinear(nn.Module):
    """A frozen Linear whose packed tensors are Parameters, because ZeRO-3 shards nothing else.

    It is built on the meta device, without memory; the loader fills the Parameters. The
    dequantized weight exists only during a call. Dequantizing costs little next to the matrix
    product, because a teacher reads many tokens at once.
    """

    stored_as: dict[str, str] = {}  # Parameter -> name of its tensor in the files, if different

    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some checkpoints (GPTQ) store a bias that the model itself does not have.
        has_bias = linear.bias is not None or f"{name}.bias" in files.tensors
        self.bias = meta_parameter((self.out_features,), linear.weight.dtype) if has_bias else None

    @classmethod
    def of(
        cls, linear: nn.Linear, name: str, files: TensorFiles, settings: dict
    ) -> "PackedLinear | None":
        """The packed layer; None if the checkpoint left it unquantized (modules_to_not_convert)."""
        return cls(linear, name, files, settings) if f"{name}.qweight" in files.tensors else None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, (out, in), in `dtype`."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer: (*, in) to (*, out), in the type of `hidden`."""
        weight = self.dequantized(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return nn.functional.linear(hidden, weight, bias)


def meta_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A frozen Parameter of `shape` on the meta device."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def stored_dtype(files: TensorFiles, name: str) -> torch.dtype:
    """The type of a tensor in the files; a missing tensor is reported when it is loaded."""
    return files.tensors[name].dtype if name in files.tensors else torch.float16
