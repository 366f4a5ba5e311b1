"""RMSNorm and SwiGLU of liger-kernel, one kernel each, in place of Transformers' on a GPU.

launch/setup.sh installs the package where there is a GPU (extra `fast`). Its losses, head and
rotary embedding are not used: the loss of kd.losses has no logits to replace.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kd.recipe import AUTO

FAMILIES = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")  # tested against Transformers
KERNELS = ("rms_norm", "swiglu")  # arguments of Liger's function for a family


def lack(config: PretrainedConfig) -> str | None:
    """Why a model cannot run with Liger's kernels on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (run bash launch/setup.sh)"
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is none of {', '.join(FAMILIES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"the activation is {config.hidden_act} instead of silu"
    return None


def check_liger(wanted: bool | Literal["auto"], config: PretrainedConfig, name: str) -> None:
    """Raise ValueError if Liger's kernels are required and the model cannot run with them."""
    why = lack(config) if wanted is True else None
    if why:
        raise ValueError(f"liger_kernels: true, but for {name} {why}; set liger_kernels: auto")


def use_liger(model: PreTrainedModel, wanted: bool | Literal["auto"]) -> None:
    """Let a model's norms and MLPs call Liger's kernels for tensors on a GPU.

    Weights and module classes stay, so adapters, ZeRO-3 and packed layers work as before. With
    "auto" nothing changes where `lack` has a reason. Other models of the process are unaffected.
    """
    assert wanted in (True, False, AUTO)
    if not wanted or lack(model.config):
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    switches = {name: name in KERNELS for name in inspect.signature(apply).parameters}
    definitions = vars(sys.modules[type(model).__module__])
    original = dict(definitions)
    forwards = {module: module.forward for module in model.modules()}
    apply(**switches | {"model": model})
    definitions.update(original)  # it has replaced the classes of later models, too
    for module, forward in forwards.items():
        if module.forward != forward:
            module.forward = partial(_choose, module.forward, forward)


def _choose(kernel: Callable, forward: Callable, hidden: Tensor) -> Tensor:
    """Run Liger's forward, (*, H) to (*, H), or the own one: models are also checked on the CPU."""
    return (kernel if on_gpu(hidden) else forward)(hidden)


def on_gpu(hidden: Tensor) -> bool:
    """Whether hidden states, (*, H), are on a GPU, where kernels run."""
    return hidden.is_cuda
