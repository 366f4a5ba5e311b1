"""Activations of a forward and a backward pass, measured by tracing the model on fake tensors.

Fake tensors have shapes but no memory. The student's own code runs, so norms, adapters,
checkpointing and casts are counted as they are. Two truncated models are traced; the difference
between them is what one block adds. B batch, T tokens, H hidden.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, masking_utils

DEPTHS = (2, 3)  # blocks in the truncated models


class CannotTrace(RuntimeError):
    """The model can be trained but not traced, so its memory cannot be planned."""


@dataclass(frozen=True)
class Activations:
    """Bytes in addition to the weights and their gradients."""

    kept: float  # at the end of the forward pass, for the backward pass
    forward: float  # peak of the forward pass
    backward: float  # peak of the backward pass


def trace_activations(
    config: PretrainedConfig,
    build: Callable[[PretrainedConfig], nn.Module],
    rows: int,
    length: int,
    **options: Any,
) -> Activations:
    """Activations of (rows, length) tokens in the backbone of `build(config)`.

    `options` are those of `trace`.

    Raises CannotTrace for models in which a tensor's shape depends on another tensor's values.
    """
    depth = config.get_text_config().num_hidden_layers
    found = []
    for blocks in DEPTHS:
        model = build(truncated(config, blocks))
        try:
            found.append(trace(model, rows, length, **options))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            kind = type(model).__name__
            raise CannotTrace(f"{kind}: tensor shapes depend on values ({error})") from error
    few, more = found
    beyond = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return Activations(*(a + (b - a) * beyond for a, b in zip(few, more, strict=True)))


def truncated(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    """A copy of the configuration with that number of blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = blocks
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * blocks)[:blocks]
    return config


def trace(
    model: nn.Module,
    rows: int,
    length: int,
    *,
    checkpointing: bool = False,
    gradients: bool = True,
    packed: bool = False,
    autocast: torch.dtype | None = None,
    device: str = "cuda",
    repeats_keys: bool = False,
) -> tuple[int, int, int]:
    """Bytes (kept for the backward, peak of the forward, peak of the backward)."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    replace_four_bit_products(model)
    model.train(gradients)
    if checkpointing and gradients:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with FakeTensorMode(), attention_of(device, repeats_keys):
        make_fake(model)
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if packed else None
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are counted by model_states.py
                parameter.register_post_accumulate_grad_hook(drop_gradient)
        live = LiveBytes(list(model.parameters()) + list(model.buffers()))
        with live, torch.set_grad_enabled(gradients):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                hidden = causal_lm.base_model(
                    input_ids=ids, attention_mask=mask, use_cache=False
                ).last_hidden_state  # (B, T, H)
            kept, forward = live.now, live.peak
            if not gradients:
                return kept, forward, forward
            live.peak = live.now
            gradient = torch.empty_like(hidden)
            torch.autograd.backward(hidden, gradient)
    return kept, forward, live.peak


def drop_gradient(parameter: Tensor) -> None:
    """Free the gradient of a weight (any shape) as soon as it has been accumulated."""
    parameter.grad = None


def make_fake(model: nn.Module) -> None:
    """Replace meta tensors, which autocast does not support, by fake CPU tensors."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    known[id(tensor)] = fake
                tensors[name] = known[id(tensor)]


class LiveBytes(TorchDispatchMode):
    """Count the bytes of live storages that operations have created, and their peak."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and count its results."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage unless it is known, until it is freed."""
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        """Stop counting a freed storage."""
        self.now -= self.sizes.pop(key)


@contextlib.contextmanager
def attention_of(device: str, repeats_keys: bool) -> Iterator[None]:
    """Inside, attention saves what the kernels of `device` save; PyTorch can fake a CPU's own.

    With `repeats_keys`, as many keys and values as queries, as kd.models.attention gives to the
    kernels of older GPUs.

    Transformers cannot read values of fake position_ids, so it would materialize a causal mask as
    for packed rows; for packed rows the caller passes the mask.
    """
    original = nn.functional.scaled_dot_product_attention
    find_documents = masking_utils.find_packed_sequence_indices

    def flash(query, key, value, attn_mask=None, *_, **__):
        groups = query.shape[1] // key.shape[1]
        if repeats_keys and groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return FlashAttention.apply(query, key, value, attn_mask)

    nn.functional.scaled_dot_product_attention = flash if device == "cuda" else original
    masking_utils.find_packed_sequence_indices = lambda *_: None
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
        masking_utils.find_packed_sequence_indices = find_documents


class FlashAttention(torch.autograd.Function):
    """Save inputs, output and a float32 normalizer per query; a mask in the inputs' dtype.

    Query, key, value and output are (B, heads, T, head width).
    """

    @staticmethod
    def forward(ctx, query, key, value, mask):
        """The output, without values."""
        out = torch.empty_like(query)
        normalizer = query.new_empty(query.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else torch.empty_like(mask, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, out, normalizer, bias)
        return out

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of query, key and value, without values."""
        query, key, value, *_ = ctx.saved_tensors
        return *(torch.empty_like(x) for x in (query, key, value)), None


class FourBitProduct(torch.autograd.Function):
    """bitsandbytes' product: the unpacked weight exists only during a forward or backward call."""

    @staticmethod
    def forward(ctx, hidden, shape):
        """(B, T, in) to (B, T, out), without values; `shape` is the weight's (out, in)."""
        ctx.shape = shape
        weight = hidden.new_empty(shape)
        return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        """(B, T, out) to (B, T, in), without values."""
        weight = gradient.new_empty(ctx.shape)
        return gradient.new_empty(*gradient.shape[:-1], weight.shape[1]), None


def replace_four_bit_products(model: nn.Module) -> None:
    """Let bitsandbytes' 4-bit Linears compute on fake tensors."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            shape = (module.out_features, module.in_features)
            module.forward = lambda hidden, shape=shape: FourBitProduct.apply(hidden, shape)
