"""Switch a model from training to generation and back: original forwards, whole weights, no hooks.

B rows, V vocabulary.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
SCORE_BYTES = 24  # per id and generation step: logits, scores and noise in float64


def row_bytes(config: PreTrainedConfig, length: int, itemsize: int) -> int:
    """Bytes to generate a row of `length` tokens: its keys and values, and one step's scores."""
    text = config.get_text_config().to_dict()
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    width *= text.get("num_key_value_heads") or heads
    keys_and_values = length * 2 * text["num_hidden_layers"] * width * itemsize
    return keys_and_values + SCORE_BYTES * text["vocab_size"]


@contextlib.contextmanager
def generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside, `model.generate` follows `config` alone and runs no collectives.

    So ranks may run different numbers of forwards. The forwards set by
    kd.models.heads.return_loss are put aside. Under ZeRO-3 the weights are gathered once, and all
    ranks must enter and leave. DeepSpeed's hooks are off: they would release the weights after each
    forward and add to the trace of the training forward.
    """
    modules, head = list(model.modules()), model.get_output_embeddings()
    states = [(module.training, *(getattr(module, name) for name in HOOKS)) for module in modules]
    forwards = [(part, part.__dict__.pop("forward")) for part in (model, head)]
    own_config = model.generation_config
    model.eval()
    for module in modules:
        for name in HOOKS:
            setattr(module, name, OrderedDict())
    model.generation_config = config  # generate takes from here what its argument leaves open
    try:
        # no_grad, not inference_mode: a backward may need tensors that the model caches here.
        with gathered_weights(model), torch.no_grad():
            yield
    finally:
        model.generation_config = own_config
        for module, (training, *hooks) in zip(modules, states, strict=True):
            module.training = training
            for name, found in zip(HOOKS, hooks, strict=True):
                setattr(module, name, found)
        for part, forward in forwards:
            part.forward = forward


def gathered_weights(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """Collective under ZeRO-3: inside, every rank has the whole of every parameter."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Small parameters are always whole. Gathering them here would partition them on leaving.
    sharded = [p for p in model.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(sharded)
