"""What a forward and a backward pass hold beside the weights, found by running them without numbers.

The student's own code runs on fake tensors, which have shapes and no memory, so that norms,
adapters, checkpointing and the copies between types are counted as they are. Two truncated models
are run; what a block adds is the difference between them. B rows, T tokens, H hidden.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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

DEPTHS = (2, 3)  # blocks of the truncated models


class CannotTrace(RuntimeError):
    """A model that can be trained, but not planned."""


@dataclass(frozen=True)
class Activations:
    """Bytes above the weights; gradients of trained weights are no part of them."""

    kept: float  # at the end of the forward pass, for the backward pass
    forward: float  # most at one time in the forward pass
    backward: float  # most at one time in the backward pass


def trace_activations(
    config: PretrainedConfig,
    build: Callable[[PretrainedConfig], nn.Module],
    rows: int,
    length: int,
    *,
    checkpointing: bool = False,
    gradients: bool = True,
    packed: bool = False,
    autocast: torch.dtype | None = None,
    device: str = "cuda",
) -> Activations:
    """Of (rows, length) tokens through `build(config)`'s backbone, at the config's own depth.

    Raises CannotTrace for models whose shapes depend on numbers.
    """
    depth = config.get_text_config().num_hidden_layers
    found = []
    for blocks in DEPTHS:
        model = build(truncated(config, blocks))
        options = (checkpointing, gradients, packed, autocast, device)
        try:
            found.append(trace(model, rows, length, *options))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            kind = type(model).__name__
            raise CannotTrace(f"{kind}: its shapes depend on its numbers ({error})") from error
    few, more = found
    beyond = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return Activations(*(a + (b - a) * beyond for a, b in zip(few, more, strict=True)))


def truncated(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
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
    checkpointing: bool,
    gradients: bool,
    packed: bool,
    autocast: torch.dtype | None,
    device: str,
) -> tuple[int, int, int]:
    """(kept, most in the forward pass, most in the backward pass) in bytes."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    replace_four_bit_products(model)
    model.train(gradients)
    if checkpointing and gradients:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with FakeTensorMode(), attention_of(device):
        make_fake(model)
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if packed else None
        for parameter in model.parameters():
            if parameter.requires_grad:  # reduced and freed, or counted elsewhere
                parameter.register_post_accumulate_grad_hook(forget_gradient)
        live = LiveBytes(list(model.parameters()) + list(model.buffers()))
        with live, torch.set_grad_enabled(gradients):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                hidden = causal_lm.base_model(
                    input_ids=ids, attention_mask=mask, use_cache=False
                ).last_hidden_state  # (B, T, H)
            kept, forward = live.now, live.most
            if not gradients:
                return kept, forward, forward
            live.most = live.now
            gradient = torch.empty_like(hidden)
            torch.autograd.backward(hidden, gradient)
    return kept, forward, live.most


def forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def make_fake(model: nn.Module) -> None:
    """Fake CPU tensors in place of those on the meta device, which autocast does not know."""
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
    """Bytes of the storages that operations have made and that are still alive."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


@contextlib.contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Attention keeps what the kernels of a device keep; a CPU's own have their fakes in PyTorch.

    Transformers cannot read fake position_ids, so it would write a causal mask out, as for rows of
    several documents; where there are such rows the mask is given.
    """
    original = nn.functional.scaled_dot_product_attention
    find_documents = masking_utils.find_packed_sequence_indices

    def flash(query, key, value, attn_mask=None, *_, **__):
        return FlashAttention.apply(query, key, value, attn_mask)

    nn.functional.scaled_dot_product_attention = flash if device == "cuda" else original
    masking_utils.find_packed_sequence_indices = lambda *_: None
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
        masking_utils.find_packed_sequence_indices = find_documents


class FlashAttention(torch.autograd.Function):
    """Keeps its inputs, its output and a float32 number a row; a mask in the type of the inputs."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = torch.empty_like(query)
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        bias = None if mask is None else torch.empty_like(mask, dtype=query.dtype)
        ctx.save_for_backward(query, key, value, out, normaliser, bias)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        return *(torch.empty_like(x) for x in (query, key, value)), None


class FourBitProduct(torch.autograd.Function):
    """bitsandbytes' product: the weight in full exists inside the call, in either direction."""

    @staticmethod
    def forward(ctx, hidden, shape):
        ctx.shape = shape
        weight = hidden.new_empty(shape)
        return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        weight = gradient.new_empty(ctx.shape)
        return gradient.new_empty(*gradient.shape[:-1], weight.shape[1]), None


def replace_four_bit_products(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            shape = (module.out_features, module.in_features)
            module.forward = lambda hidden, shape=shape: FourBitProduct.apply(hidden, shape)
