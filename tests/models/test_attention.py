"""Attention on GPUs with and without FlashAttention: which call reaches PyTorch, and its result."""

import pytest
import torch
from small import save_small, small_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from kd.models.attention import check_attention, use_present_kernels
from kd.models.frozen import load_frozen
from kd.models.load import load_trained
from kd.models.sharding import load_unsharded
from kd.settings.distillation import ModelSettings

IDS = torch.arange(3, 35).view(2, 16)
SEPARATE = torch.arange(16).expand(2, 16)
PACKED = torch.tensor([[*range(9), *range(7)], [*range(4), *range(12)]])


def test_flash_attention_is_rejected_if_the_device_has_no_kernel(monkeypatch):
    check_attention("sdpa")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU; set sdpa"):
        check_attention("flash_attention_2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="Tesla T4 has 7.5; set sdpa"):
        check_attention("flash_attention_2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    check_attention("flash_attention_2")


@pytest.fixture
def gpu_of(monkeypatch):
    """A function that pretends a GPU of a compute capability, and undoes what it led to."""
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", AttentionInterface._global_mapping["sdpa"]
    )

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


def attention_calls(model, positions: Tensor, monkeypatch) -> tuple[list[dict], Tensor]:
    """What the model's layers pass to PyTorch's attention, and the logits."""
    calls, attend = [], nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        heads = {"heads": query.shape[1], "key_heads": key.shape[1], "value_heads": value.shape[1]}
        calls.append(heads | options)
        return attend(query, key, value, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        logits = model(IDS, position_ids=positions, use_cache=False).logits
    return calls, logits


@pytest.mark.parametrize("positions", [SEPARATE, PACKED], ids=["separate", "packed"])
def test_keys_are_repeated_only_on_a_gpu_without_flash_attention(
    tokenizer, gpu_of, monkeypatch, positions
):
    model = small_model(tokenizer).eval()
    found = {}
    for capability in ((8, 0), (7, 5)):
        gpu_of(capability)
        use_present_kernels()
        found[capability] = attention_calls(model, positions, monkeypatch)
    (ampere, wanted), (turing, logits) = found.values()
    assert len(ampere) == len(turing) == 2
    packed = positions is PACKED
    for call in ampere:
        assert call.get("enable_gqa", False) != packed
        assert call["key_heads"] == call["value_heads"] == (4 if packed else 2)
    for call in turing:
        assert not call.get("enable_gqa", False)
        assert call["heads"] == call["key_heads"] == call["value_heads"] == 4
        assert call["is_causal"] != packed
    assert torch.equal(logits, wanted)


def test_every_way_of_loading_a_model_asks_for_the_present_kernels(
    tmp_path, tokenizer, gpu_of, monkeypatch
):
    save_small(tmp_path, tokenizer)
    ways = (
        lambda: load_trained(str(tmp_path), ModelSettings(dtype="float32"), tokenizer),
        lambda: load_frozen(str(tmp_path)),
        lambda: load_unsharded(str(tmp_path), "sdpa", "float32", torch.device("cpu")),
    )
    theirs = AttentionInterface._global_mapping["sdpa"]
    for way in ways:
        AttentionInterface.register("sdpa", theirs)
        with monkeypatch.context() as patch:
            patch.setattr("kd.models.attention.gpu_runs_flash_attention", lambda: False)
            patch.setattr("kd.models.attention.torch.cuda.is_available", lambda: True)
            model = way()
        calls, _ = attention_calls(model, SEPARATE, monkeypatch)
        assert [call["key_heads"] for call in calls] == [4, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [SEPARATE, PACKED], ids=["separate", "packed"])
def test_the_memory_efficient_kernel_suffices_after_the_repetition(
    tokenizer, gpu_of, positions, dtype
):
    """With it alone allowed, PyTorch raises where it cannot serve, as for enable_gqa."""
    model = small_model(tokenizer, hidden=64).to("cuda", dtype)
    inputs = {"input_ids": IDS.cuda(), "position_ids": positions.cuda(), "use_cache": False}
    wanted = model(**inputs).logits
    gpu_of((7, 5))
    use_present_kernels()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        logits = model(**inputs).logits
        logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (logits - wanted).float().norm() < 2e-2 * wanted.float().norm()
