"""The student's replaced forward gives the loss and gradients of its plain logits."""

import pytest
import torch
from small import save_small, small_tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from kd.data.tokenizer import load_tokenizer
from kd.losses.head import Head
from kd.models.heads import LossInputs, argmax_ids, causal_lm, head_of, return_loss
from kd.models.load import load_trained
from kd.planning.activations import LiveBytes
from kd.settings.distillation import ModelSettings, Objective

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
REAL_HEADS = {
    "gemma2 caps its logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=3.0)
    ),
    "granite divides its logits": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, logits_scaling=5.0)
    ),
    "cohere multiplies its logits": lambda: CohereForCausalLM(
        CohereConfig(**SIZES, logit_scale=0.25)
    ),
}


@pytest.mark.parametrize("build", REAL_HEADS.values(), ids=REAL_HEADS.keys())
def test_the_loss_includes_the_scale_and_softcap_of_real_heads(build):
    torch.manual_seed(0)
    model = build().eval()
    ids = torch.randint(3, 60, (2, 12))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    labels = torch.cat([torch.full((2, 1), -100), ids[:, 1:]], 1)
    return_loss(model)
    positions = torch.arange(12).expand(2, 12)
    found = model(ids, positions, LossInputs(labels, Objective(soft_weight=0.0), 64))["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert head_of(model).scale != 1.0 or head_of(model).softcap == 3.0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "trained",
    [{"train_template_tokens": True}, {"lora_target_modules": ["embed_tokens", "q_proj"]}],
    ids=["template tokens", "lora on the embeddings"],
)
def test_trained_embeddings_get_the_gradient_of_plain_logits(tmp_path, trained, tied):
    """In a model with tied embeddings, the template's tokens are trained in the head, too."""
    tokenizer = small_tokenizer()
    save_small(tmp_path / "model", tokenizer, tie_word_embeddings=tied)
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    settings = ModelSettings(dtype="float32", lora_rank=2, **trained)
    ids = torch.tensor([[1, 9, 10, 2, 1, 30, 31, 2]])
    labels = torch.cat([torch.full((1, 1), -100), ids[:, 1:]], 1)
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = load_trained(str(tmp_path / "model"), settings, tokenizer)
        if fused:
            return_loss(causal_lm(model))
            inputs = LossInputs(labels, Objective(soft_weight=0.0), len(tokenizer))
            loss = model(ids, position_ids=torch.arange(8)[None], loss_inputs=inputs)["loss"]
        else:
            logits = model(input_ids=ids).logits[0, :-1, : len(tokenizer)]
            loss = cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    embedding = ("trainable_tokens_delta", "lora_embedding_B")
    assert any(part in name for name in found[0] for part in embedding)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().sum() > 0 or "lora_A" in name or "lora_embedding_" in name


def test_lora_on_the_head_is_refused(tmp_path):
    save_small(tmp_path / "model")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    settings = ModelSettings(dtype="float32", lora_rank=2, lora_target_modules=["lm_head"])
    model = load_trained(str(tmp_path / "model"), settings, tokenizer)
    with pytest.raises(ValueError, match="wanted a plain Linear"):
        return_loss(causal_lm(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_the_most_probable_ids_need_no_float32_copy_of_the_head(dtype, bias, monkeypatch):
    monkeypatch.setattr("kd.losses.fused.PIECE_BYTES", 2**14)
    rows, vocab_size, width, tokens = 5_100, 5_000, 64, 7  # 100 rows of padding
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=draw).to(dtype)
    hidden = torch.randn(tokens, width, generator=draw).to(dtype)
    head = Head(weight, torch.randn(rows, generator=draw).to(dtype) if bias else None, 0.1, 2.0)
    expected = hidden.float() @ weight[:vocab_size].float().T
    expected += head.bias[:vocab_size].float() if bias else 0.0
    with LiveBytes([weight, hidden]) as live:
        found = argmax_ids(hidden, head, vocab_size)
    assert found.tolist() == expected.argmax(-1).tolist()
    logits, pieces = 4 * tokens * vocab_size, 2 * 2**14
    assert live.peak < logits + pieces + 2**15 < 4 * weight.numel() / 4
