"""Which attention kernels the GPU has, and how SDPA is called on a GPU that has fewer.

B batch, T tokens, D head width.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

AMPERE = (8, 0)  # compute capability of the first GPUs with kernels of FlashAttention-2


def gpu_runs_flash_attention() -> bool:
    """Whether there is a GPU, and FlashAttention-2 has kernels for it."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= AMPERE


def check_attention(implementation: str) -> None:
    """Raise ValueError if this machine has no kernel for the attention implementation."""
    if implementation != "flash_attention_2" or gpu_runs_flash_attention():
        return
    if not torch.cuda.is_available():
        raise ValueError("attn_implementation: flash_attention_2 needs a GPU; set sdpa")
    major, minor = torch.cuda.get_device_capability()
    raise ValueError(
        f"attn_implementation: flash_attention_2 needs compute capability 8.0 or more, and "
        f"{torch.cuda.get_device_name()} has {major}.{minor}; set sdpa, which "
        "separates packed documents with a mask"
    )


def use_present_kernels() -> None:
    """On a GPU older than Ampere, let `sdpa` repeat keys and values; elsewhere change nothing.

    Every model that is loaded afterwards is affected: Transformers looks the function up by name at
    each call. Its own function passes enable_gqa if there is no mask. For that, PyTorch has only
    FlashAttention, which needs Ampere, and the math kernel, which computes half-precision inputs in
    float32 and keeps (B, heads, T, T). With as many keys as queries there is also the
    memory-efficient kernel.
    """
    if torch.cuda.is_available() and not gpu_runs_flash_attention():
        AttentionInterface.register("sdpa", sdpa_with_repeated_keys)


def sdpa_with_repeated_keys(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,
) -> tuple[Tensor, None]:
    """Transformers' SDPA, without enable_gqa.

    query is (B, heads, T, D), key and value are (B, key heads, T, D). Returns (B, T, heads, D).
    With a mask, or a paged cache, Transformers repeats keys and values itself.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and attention_mask is None and options.get("cache") is None:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
