"""LoRA layers that scale the adapter and add it to the base layer's result within one product.

PEFT computes base + B(A(dropout(x))) * scaling in separate operations: the product, the scaling,
the sum, and in some cases casts and a clone. Each reads and writes a whole output. Names, weights,
files and merging are PEFT's. N tokens, R rank.
"""

import bitsandbytes as bnb
import torch
from peft.tuners import lora
from torch import Tensor, nn


class AddedLinear(nn.Linear):
    """PEFT's lora_B, which can add its product to the base layer's result."""

    def forward(self, low: Tensor, base: Tensor | None = None, scaling: float = 1.0) -> Tensor:
        """(*, R) to (*, out); with `base`, (*, out) of the same type: base + scaling * product."""
        if base is None:
            return super().forward(low)
        rows, low = base.flatten(0, -2), low.flatten(0, -2)  # (N, out), (N, R)
        return torch.addmm(rows, low, self.weight.T, alpha=scaling).view_as(base)


class AddedLora:
    """The forward of a LoRA layer with one plain adapter; PEFT's own in all other cases.

    It calls lora_A and lora_B as modules, because ZeRO-3 gathers weights in the hooks of modules.
    """

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        """Create an adapter as PEFT does."""
        super().update_layer(adapter_name, *args, **kwargs)
        if type(self.lora_B[adapter_name]) is nn.Linear:
            self.lora_B[adapter_name].__class__ = AddedLinear

    def adds_one_adapter(self) -> bool:
        """Whether there is exactly one active adapter, and it is plain, unmerged LoRA."""
        if self.disable_adapters or self.merged or self.lora_variant:
            return False
        names = self.active_adapters
        return len(names) == 1 and names[0] in self.lora_A and not self.lora_bias[names[0]]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(*, in) to (*, out), in the type of the base layer's result."""
        if args or kwargs or not self.adds_one_adapter():
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        first, second, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        result = self.base_layer(x)
        if not torch.is_autocast_enabled(x.device.type):  # it casts by itself
            x = self._cast_input_dtype(x, first.weight.dtype)
        low = first(self.lora_dropout[name](x))  # (*, R)
        if low.dtype == result.dtype:
            return second(low, result, scaling)
        return (result + second(low) * scaling).to(result.dtype)  # float32 adapters


class AddedLoraLinear(AddedLora, lora.Linear):
    """On an unquantized Linear."""


class AddedLoraLinear4bit(AddedLora, lora.Linear4bit):
    """On a 4-bit Linear of bitsandbytes."""


# Of base layer and LoRA layer; the first match counts, and a Linear4bit is a Linear.
LAYERS = {bnb.nn.Linear4bit: AddedLoraLinear4bit, nn.Linear: AddedLoraLinear}
