"""The LoRA layers give the numbers, gradients and files of PEFT's, with fewer operations."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from safetensors.torch import load_file
from small import save_small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd.models.load import load_trained
from kd.models.lora import AddedLoraLinear, AddedLoraLinear4bit
from kd.pretrained import load_model
from kd.settings.distillation import ModelSettings

IDS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_small(tmp_path_factory.mktemp("lora") / "model", tokenizer, hidden=64)


def load(folder, tokenizer, monkeypatch, ours: bool, dropout=0.0, **settings) -> PeftModel:
    """A student with adapters that are not zero, of our layers or of PEFT's own."""
    given = {"dtype": "float32", "lora_rank": 4, "lora_alpha": 6.0, "lora_dropout": dropout}
    with monkeypatch.context() as patch:
        if not ours:
            patch.setattr("kd.models.load.LAYERS", {})
        model = load_trained(str(folder), ModelSettings(**given | settings), tokenizer)
    kinds = {type(m) for m in model.modules() if isinstance(m, lora.LoraLayer)}
    four_bit = settings.get("quantization") == "nf4"
    wanted = AddedLoraLinear4bit if four_bit else AddedLoraLinear
    assert kinds == {wanted if ours else wanted.__mro__[2]}
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor, by norm."""
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in wanted.items())
    return max(
        ((found[k] - v).double().norm() / v.double().norm()).item() for k, v in wanted.items()
    )


def run_layer(layer: nn.Module, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """The result of a layer, and the gradients of its input and its adapter."""
    torch.manual_seed(2)
    x = torch.randn(2, 16, layer.in_features).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = layer.train()(x)
    result.backward(torch.randn(result.shape).to(result.dtype))
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    assert len(trained) == 2
    return trained | {"x": x.grad, "result": result.detach()}


def layers(models: list[PeftModel], name: str, all_half: bool) -> list[nn.Module]:
    """One layer of every model; DeepSpeed makes the adapters of a bfloat16 model bfloat16, too."""
    found = [m.get_base_model().model.layers[1].get_submodule(name) for m in models]
    for layer in found if all_half else ():
        layer.lora_A.to(torch.bfloat16)
        layer.lora_B.to(torch.bfloat16)
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_gives_the_result_and_gradients_of_peft(
    folder, tokenizer, monkeypatch, quantization, dropout
):
    settings = {"quantization": quantization, "dropout": dropout}
    models = [load(folder, tokenizer, monkeypatch, ours, **settings) for ours in (True, False)]
    for name in ("self_attn.q_proj", "mlp.down_proj"):  # with a bias and without
        found = [run_layer(each, torch.float32, False) for each in layers(models, name, False)]
        assert distance(*found) < 1e-6, name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "dtype, autocast, all_half",
    [("float32", True, False), ("bfloat16", True, False), ("bfloat16", False, False),
     ("bfloat16", False, True)],
)  # fmt: skip
def test_a_layer_rounds_no_more_than_peft(
    folder, tokenizer, monkeypatch, quantization, dtype, autocast, all_half
):
    """By the formula in float64, on the base layer's own result. PEFT's types are kept."""
    settings = {"quantization": quantization, "dtype": dtype}
    models = [load(folder, tokenizer, monkeypatch, ours, **settings) for ours in (True, False)]
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        both = layers(models, name, all_half)
        ours, theirs = (run_layer(each, getattr(torch, dtype), autocast) for each in both)
        exact = formula(both[0], getattr(torch, dtype), autocast)
        for key, truth in exact.items():
            errors = [
                ((x[key].double() - truth).norm() / truth.norm()).item() for x in (ours, theirs)
            ]
            assert ours[key].dtype == theirs[key].dtype
            # The sum is rounded once instead of three times. Gradients have as many roundings in
            # another order.
            assert errors[0] <= (1 if key == "result" else 1.25) * errors[1] < 2**-7, (name, key)


@torch.no_grad()
def formula(layer: nn.Module, dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    """In float64: base + scaling * x A^T B^T, and the gradients of A and B."""
    torch.manual_seed(2)
    x = torch.randn(2, 16, layer.in_features).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base = layer.base_layer(x)
    gradient = torch.randn(base.shape).to(base.dtype).flatten(0, 1).double()
    x, a, b = (
        t.double()
        for t in (x.flatten(0, 1), layer.lora_A.default.weight, layer.lora_B.default.weight)
    )
    scaling = layer.scaling["default"]
    return {
        "result": base.double() + scaling * (x @ a.T @ b.T).view(base.shape),
        "lora_A.default.weight": scaling * (gradient @ b).T @ x,
        "lora_B.default.weight": scaling * gradient.T @ (x @ a.T),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_as_with_peft(folder, tokenizer, monkeypatch, checkpointing):
    found = []
    for ours in (True, False):
        model = load(folder, tokenizer, monkeypatch, ours, 0.3).double().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        logits = model(input_ids=IDS, use_cache=False).logits
        logits.log_softmax(-1)[..., 7].sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        found[-1]["logits"] = logits.detach()
    assert len(found[0]) == 29 and distance(*found) < 1e-6


class LargeOperations(TorchDispatchMode):
    """The names of operations, views apart, whose result has at least `least` numbers."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.names = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note an operation and run it."""
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.least and not function.is_view:
            self.names.append(function._schema.name.removeprefix("aten::"))
        return result


def test_a_layer_adds_its_adapter_in_one_operation(folder, tokenizer, monkeypatch):
    found = {}
    for ours in (True, False):
        model = load(folder, tokenizer, monkeypatch, ours)
        layer = model.get_base_model().model.layers[0].mlp.up_proj  # without a bias, 64 to 128
        hidden = torch.randn(2, 16, 64)
        with LargeOperations(2 * 16 * 128) as forward:
            result = layer(hidden)
        gradient = torch.ones_like(result)
        with LargeOperations(2 * 16 * 128) as backward:
            result.backward(gradient)
        found[ours] = [
            [name for name in operations.names if "view" not in name]
            for operations in (forward, backward)
        ]
    assert found[True] == [["mm", "addmm"], []]
    assert found[False] == [["mm", "mm", "mul", "add"], ["mul"]]


@torch.no_grad()
def test_other_cases_are_left_to_peft(folder, tokenizer, monkeypatch, tmp_path):
    """Adapters off, two adapters, merged; and the saved files, which load without our layers."""
    ours, theirs = (load(folder, tokenizer, monkeypatch, o).eval() for o in (True, False))

    def difference() -> float:
        a, b = (m(input_ids=IDS, use_cache=False).logits for m in (ours, theirs))
        return ((a - b).norm() / b.norm()).item()

    base = load_model(folder)(input_ids=IDS, use_cache=False).logits
    with ours.disable_adapter():
        assert torch.equal(ours(input_ids=IDS, use_cache=False).logits, base)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    file = "adapter_model.safetensors"
    saved = load_file(tmp_path / "ours" / file)
    assert saved.keys() == load_file(tmp_path / "theirs" / file).keys()
    for model in (ours, theirs):
        torch.manual_seed(3)
        second = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model.add_adapter("second", second)
        model.base_model.set_adapter(["default", "second"])
    assert difference() < 1e-6
    for model in (ours, theirs):
        model.base_model.set_adapter("default")
        model.merge_adapter()
    assert difference() < 1e-6
