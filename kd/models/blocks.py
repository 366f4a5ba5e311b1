"""The decoder's blocks: their states kept for a loss, and a wide batch taken through them in pieces.

B batch, T tokens, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    return model.base_model.layers


@contextlib.contextmanager
def layer_states(
    model: PreTrainedModel, layers: list[int], select: Callable[[Tensor], Any] = lambda state: state
) -> Iterator[dict[int, Any]]:
    """Inside, every call of the model leaves `select` of its (B, T, H) states of `layers` in the dict.

    Only the chosen ones are kept. The last layer is the output of the final norm, which is what
    `last_hidden_state` is, so its owner adds it.
    """
    blocks, found, hooks = decoder_blocks(model), {}, []
    for layer in {n for n in layers if n < len(blocks)}:

        def keep(_, inputs, kwargs, layer=layer):
            found[layer] = select(inputs[0] if inputs else kwargs["hidden_states"])

        # What goes into block n + 1 is what comes out of block n, or of the embeddings for n = 0.
        hooks.append(blocks[layer].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def in_pieces(model: PreTrainedModel, pieces: list[tuple[int, int]]) -> Iterator[None]:
    """Inside, blocks and final norm take a batch piece by piece: `pieces` are (rows, length) each.

    So they need the memory of one piece beside the states of all, and compute it in the shapes that
    it has alone. For right-padded rows and forwards without gradient: a piece's result is written
    over its input.
    """
    modules = [*decoder_blocks(model), model.base_model.norm]
    for module in modules:
        module.forward = partial(piece_by_piece, module.forward, pieces)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def piece_by_piece(
    forward: Callable[..., Tensor], pieces: list[tuple[int, int]], hidden: Tensor, **inputs
) -> Tensor:
    """A forward over (B, T, H) with B the rows of all pieces and T the greatest length."""
    assert not torch.is_grad_enabled() and len(hidden) == sum(rows for rows, _ in pieces)
    start = 0
    for rows, length in pieces:
        part = slice(start, start + rows)
        mine = {name: cut(value, part, length) for name, value in inputs.items()}
        hidden[part, :length] = forward(cut(hidden, part, length), **mine)
        start += rows
    return hidden


def cut(value: Any, rows: slice, length: int) -> Any:
    """The piece's part of what a block is given: states and positions, or masks (B, 1, T, T)."""
    if isinstance(value, Tensor):
        mask = value.dim() == 4
        return value[rows, :, :length, :length] if mask else value[rows, :length]
    if isinstance(value, tuple):
        return tuple(cut(part, rows, length) for part in value)
    return value
