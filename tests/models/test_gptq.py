"""The GPTQ layout, with act-order, against GPTQModel's code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kd.models.gptq import GptqLinear
from kd.models.tensor_files import TensorFiles

FIXTURE = Path(__file__).parent / "fixtures" / "gptq_layer.safetensors"


@pytest.mark.parametrize("form, zeros", [("gptq", "qzeros"), ("gptq_v2", "qzeros_v2")])
def test_unpacking_agrees_with_gptqmodel(tmp_path, form, zeros):
    stored = load_file(FIXTURE)
    assert not torch.equal(stored["g_idx"], stored["g_idx"].sort().values)  # act-order
    packed = {name: stored[name] for name in ("qweight", "scales", "g_idx")}
    packed["qzeros"] = stored[zeros]
    packed["bias"] = torch.randn(96).half()  # GPTQ stores a bias even if the model has none
    save_file({f"layer.{k}": v for k, v in packed.items()}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    settings = {"bits": 4, "group_size": 32, "checkpoint_format": form}
    layer = GptqLinear(nn.Linear(64, 96, bias=False), "layer", files, settings)
    for name, parameter in list(layer.named_parameters()):
        files.check_shape(f"layer.{name}", tuple(parameter.shape))
        setattr(layer, name, nn.Parameter(packed[name], requires_grad=False))
    assert not files.tensors.keys() - {f"layer.{n}" for n, _ in layer.named_parameters()}
    assert torch.equal(layer.dequantized(torch.float16).T, stored["weight"])
    hidden = torch.randn(5, 64)
    expected = hidden @ stored["weight"].float() + packed["bias"].float()
    torch.testing.assert_close(layer(hidden), expected, rtol=2e-3, atol=2e-3)
