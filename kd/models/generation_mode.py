"""A model that is being trained writes for a moment: as it was loaded, on whole weights, hooks off.

B rows, V vocabulary.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
SCORES = 24  # bytes of an id in a step of generation: logits, scores and noise in float64


def row_bytes(config: PreTrainedConfig, length: int, itemsize: int) -> int:
    """What a row of `length` tokens needs while it is written: keys and values, and its scores."""
    text = config.get_text_config().to_dict()
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    width *= text.get("num_key_value_heads") or heads
    return length * 2 * text["num_hidden_layers"] * width * itemsize + SCORES * text["vocab_size"]


@contextlib.contextmanager
def generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Inside, `model.generate` works by `config` alone, and no collective runs.

    So ranks may make different numbers of forwards. The forwards of kd.models.heads.return_loss are
    set aside. Under ZeRO-3 the weights are gathered once, and every rank must enter and leave.
    DeepSpeed's hooks would otherwise let go of them after each forward; as they do not run, its
    trace of the training's forward stays as it is.
    """
    modules, head = list(model.modules()), model.get_output_embeddings()
    states = [(module.training, *(getattr(module, name) for name in HOOKS)) for module in modules]
    forwards = [(part, part.__dict__.pop("forward")) for part in (model, head)]
    own_config = model.generation_config
    model.eval()
    for module in modules:
        for name in HOOKS:
            setattr(module, name, OrderedDict())
    model.generation_config = config  # generate fills what its argument leaves open from there
    try:
        # Not inference_mode: what a model keeps of a forward may be needed in the backward of another.
        with whole_weights(model), torch.no_grad():
            yield
    finally:
        model.generation_config = own_config
        for module, (training, *hooks) in zip(modules, states, strict=True):
            module.training = training
            for name, found in zip(HOOKS, hooks, strict=True):
                setattr(module, name, found)
        for part, forward in forwards:
            part.forward = forward


def whole_weights(model: PreTrainedModel) -> contextlib.AbstractContextManager:
    """Collective under ZeRO-3: inside, every parameter is whole on every rank."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Small ones are whole all the time; gathered here they would be partitioned behind.
    apart = [p for p in model.parameters() if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(apart)
