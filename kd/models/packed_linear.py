"""What all Linears of packed numbers have in common: frozen tensors in, one matrix product out."""

import torch
from torch import Tensor, nn

from kd.models.tensor_files import TensorFiles


class PackedLinear(nn.Module):
    """A frozen Linear whose packed tensors are Parameters, because ZeRO-3 shards nothing else.

    It is built without memory, on the meta device; whoever loads it fills the Parameters. The
    weight exists for the length of one call. A teacher reads many tokens at a time, so forming it
    costs little beside the product.
    """

    stored_as: dict[str, str] = {}  # Parameter -> its tensor's name in files, where that differs

    def __init__(self, linear: nn.Linear, name: str, files: TensorFiles):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some checkpoints (GPTQ) bring a bias that the model itself does not have.
        has_bias = linear.bias is not None or f"{name}.bias" in files.tensors
        self.bias = frozen((self.out_features,), linear.weight.dtype) if has_bias else None

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """(out, in)"""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight_in(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return nn.functional.linear(hidden, weight, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def stored_dtype(files: TensorFiles, name: str) -> torch.dtype:
    """The type that the file gives a tensor; what is missing is reported when it is loaded."""
    return files.tensors[name].dtype if name in files.tensors else torch.float16
