"""Pre-quantized bitsandbytes checkpoints against the layers of bitsandbytes."""

import pytest
import torch
from scripts import run_main
from small import save_small
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kd.models.frozen import load_frozen
from kd.models.load import disable_cpu_repacking
from kd.models.nf4 import Nf4Linear
from kd.models.sharding import load_unsharded

IDS = torch.arange(3, 40)[None]
KINDS = {  # at hidden size 160, double quantization needs several blocks of 256 maxima
    "plain": {"bnb_4bit_quant_type": "nf4"},
    "nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_logits_equal_those_of_bitsandbytes(tmp_path, kind):
    save_small(tmp_path / "model", hidden=160, tie_word_embeddings=False)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **KINDS[kind]
        ),
    )
    disable_cpu_repacking(theirs)
    theirs.save_pretrained(tmp_path / "nf4")
    ours = load_unsharded(str(tmp_path / "nf4"), "sdpa", "auto", torch.device("cpu"))
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, Nf4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        other = theirs.get_submodule(name)
        square = torch.eye(layer.in_features, dtype=torch.bfloat16)
        bias = 0 if other.bias is None else other.bias
        assert torch.equal(layer.dequantized(torch.bfloat16), (other(square) - bias).T), name
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_checkpoint_is_read_by_bitsandbytes_and_here_as_the_same_model(tmp_path, tied):
    """The oracle quantizes while it loads."""
    save_small(tmp_path / "model", hidden=160, tie_word_embeddings=tied)
    paths = ("--model", tmp_path / "model", "--output_dir", tmp_path / "nf4")
    run_main("train/quantize.py", *paths, "--format", "nf4")
    oracle = BitsAndBytesConfig(load_in_4bit=True, **KINDS["nested"])
    expected = load_frozen(str(tmp_path / "model"), quantization_config=oracle)(IDS).logits
    theirs = load_frozen(str(tmp_path / "nf4"))
    assert sum(type(module).__name__ == "Linear4bit" for module in theirs.modules()) == 14
    assert torch.equal(theirs(IDS).logits, expected)
    ours = load_unsharded(str(tmp_path / "nf4"), "sdpa", "auto", torch.device("cpu"))
    assert torch.equal(ours(IDS).logits, expected)
    with pytest.raises(ValueError, match="is quantized already"):
        run_main("train/quantize.py", "--model", tmp_path / "nf4", "--output_dir", tmp_path / "a")
