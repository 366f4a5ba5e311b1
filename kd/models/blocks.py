"""Decoder blocks: keep hidden states for a loss, or run a wide batch through blocks in parts.

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
    """Return the decoder blocks of a CausalLM. Raises ValueError if they cannot be found."""
    return _part_of(model, ("layers", "h"))  # GPT-2, GPT-J and Falcon call them h


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm behind the last decoder block. Raises ValueError if it cannot be found."""
    return _part_of(model, ("norm", "ln_f", "final_layernorm", "final_layer_norm"))


def _part_of(model: PreTrainedModel, names: tuple[str, ...]) -> Any:
    backbone = model.base_model
    found = next((getattr(backbone, name) for name in names if hasattr(backbone, name)), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}): its {type(backbone).__name__} "
            f"has no {' or '.join(names)}; wanted a decoder-only model such as Llama or Qwen"
        )
    return found


@contextlib.contextmanager
def layer_states(
    model: PreTrainedModel, layers: list[int], select: Callable[[Tensor], Any] = lambda state: state
) -> Iterator[dict[int, Any]]:
    """Collect hidden states of every call of the model inside the context.

    Yields a dict that each call fills with {layer: select(states)}, states (B, T, H), for `layers`
    except the last one. Layer 0 is the output of the embeddings, layer n that of block n. The last
    layer is the output of the final norm; callers have it as `last_hidden_state`.
    """
    blocks, found, hooks = decoder_blocks(model), {}, []
    for layer in {n for n in layers if n < len(blocks)}:

        def keep(_, inputs, kwargs, layer=layer):
            found[layer] = select(inputs[0] if inputs else kwargs["hidden_states"])

        # The input of blocks[n] is the output of layer n.
        hooks.append(blocks[layer].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def blocks_in_parts(
    model: PreTrainedModel, parts: list[tuple[int, int]], own: list[dict[str, Any]] | None = None
) -> Iterator[None]:
    """Run blocks and final norm part by part inside the context; `parts` are (rows, length).

    Blocks also get the keyword arguments that `own` has for a part.

    A call on a batch of all rows, padded to the greatest length, then needs the activations of one
    part at a time besides its hidden states, and computes each part in the shape that it has alone.
    Only for right-padded rows without gradient: the result of a part overwrites its input.
    """
    blocks, norm = decoder_blocks(model), final_norm(model)
    modules, none = [*blocks, norm], [{} for _ in parts]
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        more = none if module is norm else own or none
        module.forward = partial(_part_by_part, module.forward, parts, more)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:  # a kernel's, of the final norm
                module.forward = forward


def _part_by_part(
    forward: Callable[..., Tensor],
    parts: list[tuple[int, int]],
    own: list[dict[str, Any]],
    hidden: Tensor,
    *more,
    **inputs,
) -> Tensor:
    """Apply a block's forward to hidden states (B, T, H) in place, part by part."""
    assert not torch.is_grad_enabled() and len(hidden) == sum(rows for rows, _ in parts)
    start = 0
    for (count, length), extra in zip(parts, own, strict=True):
        rows = slice(start, start + count)
        sliced = {name: _slice(value, rows, length) for name, value in inputs.items()} | extra
        others = [_slice(value, rows, length) for value in more]
        hidden[rows, :length] = forward(_slice(hidden, rows, length), *others, **sliced)
        start += count
    return hidden


def _slice(value: Any, rows: slice, length: int) -> Any:
    """Cut a part from an input of a block: (B, T, ...) tensors, (B, 1, T, T) masks, or tuples."""
    if isinstance(value, Tensor):
        is_mask = value.dim() == 4
        return value[rows, :, :length, :length] if is_mask else value[rows, :length]
    if isinstance(value, tuple):
        return tuple(_slice(part, rows, length) for part in value)
    return value
