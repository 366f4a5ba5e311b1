"""Print, as JSON, how far models with Liger's kernels are from float64, and what was replaced.

TRITON_INTERPRET=1 python tests/jobs/liger_interpreted.py
"""

import json
import sys

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kd.models import liger
from kd.models.blocks import blocks_in_parts

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3, "rms_norm_eps": 1e-3,
}  # fmt: skip
IDS = torch.arange(3, 9)[None]


def small(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A small model of a family, whose norms have weights that differ from 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.to(device)


def replaced(model) -> list[str]:
    """The names of the modules that call Liger's kernels."""
    return [n for n, m in model.named_modules() if "_choose" in str(vars(m).get("forward"))]


def step(model) -> dict[str, torch.Tensor]:
    """The logits and the gradients of a step."""
    ids = IDS.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return gradients | {"logits": logits.detach()}


def distance(found: dict, wanted: dict) -> float:
    """The largest relative difference of a tensor, by norm."""
    return max(
        ((found[k].double() - v.double()).norm() / v.double().norm()).item()
        for k, v in wanted.items()
    )


def adapt_to_interpreter() -> None:
    """Pass floats as the compiler does, and replace the one function of CUDA's own library."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up while the interpreter runs

    others = interpreter._implicit_cvt

    def convert(value):
        if not isinstance(value, float):
            return others(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert


def main() -> None:
    adapt_to_interpreter()
    liger.lack, on_gpu = lambda config: None, liger.on_gpu
    found = {}
    for family in liger.FAMILIES:
        exact, wanted = step(small(family).double()), step(small(family))
        model = small(family)
        liger.use_liger(model, "auto")
        liger.on_gpu = on_gpu
        on_cpu = distance(step(model), wanted)
        model.zero_grad()
        liger.on_gpu = lambda hidden: True
        names = replaced(model)
        with torch.no_grad(), blocks_in_parts(model, [(1, 6)]):
            model.base_model(input_ids=IDS, use_cache=False)
        found[family] = {
            "on a CPU": on_cpu,
            "Liger": distance(step(model), exact),
            "Transformers": distance(wanted, exact),
            "replaced": sorted({name.split(".")[-1] for name in names}),
            "kept by parts": replaced(model) == names,
            "next": [replaced(small(family)), type(small(family).model.norm).__name__],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.exit(0)
