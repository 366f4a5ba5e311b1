"""The loss computes a model's logits as the model does, or the model is refused."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kd.losses.head import Head
from kd.models.heads import head_of
from kd.models.readout import check_head, scale_and_softcap

SMALL = {
    key: value
    for value, keys in {
        96: "vocab_size",
        64: "max_position_embeddings n_positions",
        48: "intermediate_size n_inner ffn_dim dim_feedforward",
        32: "hidden_size hidden_dim d_model n_embd embedding_size input_embedding_size "
        "word_embed_proj_dim encoder_ffn_dim decoder_ffn_dim",
        16: "moe_intermediate_size kv_lora_rank q_lora_rank dim_model_base",
        8: "head_dim state_size qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim",
        4: "num_attention_heads num_key_value_heads n_head num_experts num_local_experts "
        "n_routed_experts encoder_attention_heads decoder_attention_heads",
        2: "num_hidden_layers n_layer num_layers decoder_layers num_experts_per_tok "
        "num_experts_per_token top_k eos_token_id",
        1: "encoder_layers bos_token_id n_group topk_group",
        0: "pad_token_id",
    }.items()
    for key in keys.split()
} | {"is_decoder": True}
# Values that change the logits, so that ignoring one is seen.
LOGITS = {
    "logits_scaling": 5.0,
    "logit_scale": 0.25,
    "lm_head_multiplier": 0.3,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
}
CLASSES = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def small_model(name: str):
    """A random model of a type, with few small layers."""
    config_class = CLASSES[name]
    given = config_class()
    wanted = {key: value for key, value in (SMALL | LOGITS).items() if hasattr(given, key)}
    for key in list(wanted):  # some are computed from others
        if isinstance(getattr(config_class, key, None), property):
            del wanted[key]
    config = config_class(**wanted)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    with torch.device("meta"):
        assert sum(p.numel() for p in model_class(config).parameters()) < 30_000_000, "large"
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def difference(model, head: Head) -> float:
    """The largest difference of the head's logits and the model's, as a part of the largest."""
    ids = torch.tensor([[5, 9, 31, 4, 17, 60]])
    own = model(input_ids=ids, use_cache=False).logits[0]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    found = head.logits(hidden, own.shape[-1])
    return float((found - own).abs().max() / own.abs().max())


EXPECTED = {
    "cohere": (0.25, None),
    "gemma2": (1.0, 3.0),
    "granite": (0.2, None),
    "hyperclovax": (5.0, None),  # multiplies by what Granite divides by
    "minicpm3": (0.5, None),  # dim_model_base / hidden_size
    "opt": (1.0, None),  # its head is called on the decoder within its backbone
    "qwen2": (1.0, None),
    "recurrent_gemma": (1.0, 3.0),
    "xlstm": (1.0, 3.0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_scale_and_softcap_are_those_of_the_models_own_forward(name):
    model = small_model(name)
    assert scale_and_softcap(type(model), model.config) == pytest.approx(EXPECTED[name])
    assert difference(model, head_of(model)) < 1e-5


@pytest.mark.parametrize("name", ["bert", "modernbert-decoder", "llama4_text"])
def test_a_head_that_does_more_is_refused_before_weights_are_loaded(name):
    with pytest.raises(ValueError, match=f"^{name}: the loss computes logits itself") as raised:
        check_head(CLASSES[name](), "a model")
    assert len(str(raised.value).splitlines()) == 1


def test_a_model_without_logits_is_refused():
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="no/model: vit has no causal language model"):
        check_head(ViTConfig(), "no/model")


@pytest.mark.slow
def test_every_model_type_of_transformers_is_read_rightly_or_refused():
    """A wrong reading of a head trains towards other numbers than the model computes."""
    wrong, equal, refused = {}, [], []
    for name in CLASSES:
        try:
            model = small_model(name)
            model(input_ids=torch.tensor([[5, 9]]), use_cache=False)
        except Exception:  # cannot be built or run so small: each for another reason
            continue
        try:
            head = head_of(model)
        except ValueError:
            refused.append(name)
            continue
        equal.append(name)
        found = difference(model, head)
        if not found < 1e-4:
            wrong[name] = found
    assert wrong == {}
    print(f"{len(equal)} equal, {len(refused)} refused: {refused}")
    assert len(equal) > 100
