"""The output head that turns hidden states into logits, and what a live teacher hands to the loss.

n or N tokens, V vocabulary, H hidden.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 128  # ids; a GPU's matrix products and vector loads want rows that begin at multiples


def padded_width(vocab_size: int) -> int:
    """Round the width of a buffer of logits up, so that each of its rows begins aligned.

    Tokenizers have odd numbers of ids: Qwen2.5 has 151 665, in heads of 151 936 or 152 064 rows.
    """
    return -(-vocab_size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Head:
    """Logits = softcap(scale * (hidden @ weight.T + bias)), softcap(z) = c * tanh(z / c).

    Attributes:
        weight: (V, H), possibly with rows of padding after the tokenizer's ids.
        bias: (V,) or None.
        scale: Factor of the logits, as in Cohere and Granite.
        softcap: The bound c of the logits, as in Gemma 2; None leaves them unbounded.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """Compute (n, vocab_size) logits of (n, H) hidden states, in the dtype of the weight."""
        return self.finish_(hidden.to(self.weight.dtype) @ self.weight[:vocab_size].T)

    def finish_(self, product: Tensor) -> Tensor:
        """Turn the product hidden @ weight.T, (n, V), into logits in place."""
        if self.bias is not None:
            product.add_(self.bias[: product.shape[-1]])
        if self.scale != 1.0:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def unfinish_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Backpropagate through `finish_` in place.

        Turns the gradient with respect to the logits, (n, V), into the one with respect to the
        product. Overwrites `logits`, (n, V), too.
        """
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient

    def to(self, dtype: torch.dtype) -> "Head":
        """Return this head with its tensors in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)


@dataclass
class TeacherOutputs:
    """A live teacher's outputs for a batch: hidden states at target positions, and its head.

    Attributes:
        hidden: (N, H), with the teacher's own H.
        head: The head that turns them into logits.
    """

    hidden: Tensor
    head: Head = field(repr=False)
