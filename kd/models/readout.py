"""How a model turns its last hidden states into logits: a scale and a softcap, checked.

The loss computes the logits itself (kd/losses/head.py), so it must know what a model does after its
head. Configurations name it in several ways, and two models can give the same key opposite
meanings. So the candidates below are compared with the model's own forward, at no cost: a copy
without memory (on the meta device) gets a small head and random hidden states in float32.

T tokens, H hidden, V vocabulary.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kd.losses.head import Head

# Factors of the logits: configuration key -> factor of its value.
SCALES = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite, MiniCPM3
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
}
OPPOSITE = {"logits_scaling": lambda value: value}  # HyperCLOVAX multiplies
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
VOCAB = 32  # rows of the small head
SIZES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of the hidden states: one token each
TOLERANCE = 1e-4  # relative to a token's largest logit


class StubOutput(BaseModelOutputWithPast):
    """The output of a backbone, of which a head may read any field."""

    def __getattr__(self, name: str) -> None:
        """None for the fields that other backbones have."""
        if name.startswith("__"):
            raise AttributeError(name)


def scale_and_softcap(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> tuple[float, float | None]:
    """The factor and the bound with which Head computes this model's logits.

    Raises ValueError with the model type if its head does more than that.
    """
    try:
        head, hidden, expected = own_logits(model_class, config)
    except Exception as error:  # whatever the code of any architecture raises
        problem = f"its head computes more than that ({type(error).__name__}: {error})"
    else:
        for scale, softcap in candidates(config):
            found = Head(head.weight, head.bias, scale, softcap).logits(hidden, VOCAB)
            if scale > 0 and agree(found, expected):
                return scale, softcap
        problem = "its logits differ"
    raise ValueError(
        f"{config.model_type}: the loss computes logits itself, by a linear head, a scale and a "
        f"softcap, and for this model type {problem.splitlines()[0]}; wanted a model with such a "
        "head"
    )


def check_head(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError if the loss cannot compute the logits of this model. Loads no weights."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name}: {config.model_type} has no causal language model in Transformers; wanted one"
        )
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    scale_and_softcap(classes[0] if isinstance(classes, tuple) else classes, config)


def candidates(config: PretrainedConfig) -> Iterator[tuple[float, float | None]]:
    """The pairs (scale, softcap) that the configuration may mean, the likeliest first."""
    text = config.get_text_config()
    keys = [key for key in (*SCALES, *SOFTCAPS) if getattr(text, key, None)]
    softcap = next((getattr(text, key) for key in SOFTCAPS if key in keys), None)
    for readings in (SCALES, SCALES | OPPOSITE):
        factors = [readings[key](getattr(text, key)) for key in keys if key in readings]
        yield math.prod(factors, start=1.0), softcap
    yield 1.0, None


@torch.no_grad()
def own_logits(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> tuple[nn.Linear, Tensor, Tensor]:
    """Run what a model computes after its backbone, on random hidden states.

    Returns (head, hidden states (T, H), logits (T, V)). Raises ValueError for a head that is not a
    Linear.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        model = model_class(config).eval()
    layer = model.get_output_embeddings()
    if model.base_model is model or not isinstance(layer, nn.Linear):
        raise ValueError(f"found a {type(layer).__name__} as head, of {type(model).__name__}")
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(layer.in_features, VOCAB, layer.bias is not None, dtype=torch.float32)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    head.weight /= layer.in_features**0.5  # logits are as large as the hidden states
    hidden = torch.randn(len(SIZES), layer.in_features, generator=generator)
    hidden *= torch.tensor(SIZES)[:, None]
    model.set_output_embeddings(head)

    def backbone(*_: Any, **__: Any) -> StubOutput:
        return StubOutput(last_hidden_state=hidden[None])

    for module in {model.base_model, model.get_decoder()}:
        module.forward = backbone
    ids = torch.ones(1, len(SIZES), dtype=torch.long)
    return head, hidden, model(input_ids=ids, use_cache=False).logits[0]


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits, (T, V) each, are equal up to rounding."""
    if expected.is_meta or found.shape != expected.shape:
        return False
    error = (found - expected).abs().amax(-1)  # (T,)
    return bool((error <= TOLERANCE * found.abs().amax(-1)).all())
