"""The AWQ layout against AutoAWQ's code, and the checkpoint writer."""

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import succeed
from safetensors.torch import load_file
from scripts import quantize, run_main
from small import save_small
from torch import nn
from transformers import AutoModelForCausalLM

from kd.models import awq, awq_writer, packed_writer
from kd.models.frozen import load_frozen
from kd.models.sharding import load_unsharded
from kd.models.tensor_files import TensorFiles

FIXTURE = Path(__file__).parent / "fixtures" / "awq_layer.safetensors"
IDS = torch.arange(3, 40)[None]


def test_unpacking_agrees_with_autoawq():
    layer = load_file(FIXTURE)
    found = awq.dequantize(layer["qweight"], layer["qzeros"], layer["scales"], torch.float16)
    assert found.shape == layer["weight"].shape == (64, 96)
    assert torch.equal(found, layer["weight"])
    assert torch.equal(awq.unpack(layer["qweight"]), layer["numbers"].int())


def test_packing_agrees_with_autoawq():
    layer = load_file(FIXTURE)
    assert torch.equal(awq.pack(layer["numbers"]), layer["qweight"])
    assert torch.equal(awq.pack(awq.unpack(layer["qzeros"])), layer["qzeros"])


def test_rounding_error_is_at_most_half_a_step_and_zero_stays_zero():
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    weight[:, :16] += 9.0  # a group without numbers near zero
    weight[3, 16:32] = 0.0
    weight[5, 40] = 0.0
    qweight, qzeros, scales = awq_writer.quantize(weight, 16)
    found = awq.dequantize(qweight, qzeros, scales, torch.float32).T
    steps = scales.float().T.repeat_interleave(16, dim=1)
    # Half a step. At the ends of the range, rounding the zero point and the float16 scale may add
    # another half.
    assert ((found - weight).abs() <= 1.01 * steps).all()
    inner = (weight - weight.mean()).abs() < 0.5
    assert ((found - weight).abs()[inner] <= 0.51 * steps[inner]).all()
    assert (found[3, 16:32] == 0.0).all() and found[5, 40] == 0.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A model with attention biases, and its AWQ checkpoint written by the command."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_small(folder / "model", hidden=48, tie_word_embeddings=False)
    arguments = ["--model", folder / "model", "--output_dir", folder / "awq", "--group_size", 16]
    assert "saved to" in succeed(sys.executable, "train/quantize.py", *arguments)
    return folder


def rounded(checkpoints: Path):
    """The oracle: the model of Transformers with the rounded weights in its Linears."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "model")
    files = TensorFiles(checkpoints / "awq")
    for name, module in model.named_modules():
        if f"{name}.qweight" in files.tensors:
            packed = [files.read(f"{name}.{part}") for part in awq_writer.PARTS]
            module.weight.data = awq.dequantize(*packed, torch.float32).T
    return model


@torch.no_grad()
def test_a_written_checkpoint_has_the_logits_of_its_rounded_weights(checkpoints):
    found = load_unsharded(str(checkpoints / "awq"), "sdpa", "float32", torch.device("cpu"))
    assert sum(isinstance(m, awq.AwqLinear) for m in found.modules()) == 14
    assert type(found.lm_head) is nn.Linear
    difference = found(IDS).logits - rounded(checkpoints)(IDS).logits
    assert difference.abs().max() < 1e-4
    exact = AutoModelForCausalLM.from_pretrained(checkpoints / "model")
    assert (found(IDS).logits - exact(IDS).logits).abs().max() > 0.05  # rounding changes the logits


def test_a_quantized_teacher_generates_as_its_rounded_model(checkpoints):
    """Transformers itself would require gptqmodel here."""
    found = load_frozen(str(checkpoints / "awq"), torch.float32, "cpu")
    expected = rounded(checkpoints)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(IDS, **settings), expected.generate(IDS, **settings))


def test_an_interrupted_writer_continues_after_the_last_complete_file(
    checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr(packed_writer, "FILE_BYTES", 20_000)

    def write(folder, group: int = 16):
        quantize(checkpoints / "model", folder, group)
        return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}

    expected = write(tmp_path / "whole")
    assert len(expected) > 2
    writes = []
    real = packed_writer.save_file

    def save_two(*args, **kw):
        if len(writes) == 2:
            raise KeyboardInterrupt
        writes.append(real(*args, **kw))

    monkeypatch.setattr(packed_writer, "save_file", save_two)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut")
    assert not (tmp_path / "cut" / "done.json").exists()
    saved = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut").glob("*.safetensors")}
    monkeypatch.setattr(packed_writer, "save_file", real)
    assert write(tmp_path / "cut") == expected and len(saved) == 2
    assert all(file.stat().st_mtime_ns == time for file, time in saved.items())
    with pytest.raises(ValueError, match="group_size: found 16, wanted 8"):
        write(tmp_path / "cut", group=8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 8}, "'bits': 8"),
        ({"version": "gemv"}, "'version': 'gemv'"),
        ({"quant_method": "fp8"}, "fp8 weights are not read here.*python train/quantize.py"),
    ],
)
def test_other_layouts_are_rejected_by_name(checkpoints, tmp_path, changes, message):
    config = json.loads((checkpoints / "awq" / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_unsharded(str(tmp_path), "sdpa", "auto", torch.device("cpu"))


def test_a_group_size_that_divides_no_layer_is_rejected(checkpoints, tmp_path):
    arguments = ["--model", checkpoints / "model", "--output_dir", tmp_path, "--group_size", 7]
    with pytest.raises(ValueError, match="group_size: 7 divides none"):
        run_main("train/quantize.py", *arguments)
    assert not list(tmp_path.iterdir())
