"""Liger's kernels against Transformers' layers where it is installed, and when they are used."""

import importlib.util
import json
import os
import sys

import pytest
import torch
from jobs.liger_interpreted import distance, replaced, small, step
from processes import succeed

from kd.models import liger

needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


@needs_liger
def test_the_interpreted_kernels_are_as_exact_as_transformers_layers():
    """In float32, against float64. Runs in a new process: Triton reads its variable once."""
    package = {"PYTHONPATH": os.pathsep.join(sys.path)}  # it may be in a folder of its own
    job = [sys.executable, "tests/jobs/liger_interpreted.py"]
    output = succeed(*job, TRITON_INTERPRET="1", **package)
    found = json.loads(output.splitlines()[-1])
    assert found.keys() == set(liger.FAMILIES)
    for family, result in found.items():
        assert result["on a CPU"] == 0.0
        assert result["Liger"] < 2 * result["Transformers"] < 2e-5, family
        assert {"mlp", "norm", "post_attention_layernorm"} <= set(result["replaced"])
        assert not set(result["replaced"]) & {"rotary_emb", "lm_head", "self_attn"}
        assert result["kept by parts"]
        names, norm = result["next"]
        assert not names and "Liger" not in norm  # other models are unaffected


@pytest.mark.parametrize(
    "gpu, installed, family, changes, why",
    [
        (False, True, "qwen2", {}, "there is no GPU"),
        (True, False, "qwen2", {}, "liger-kernel is not installed"),
        (True, True, "gpt2", {}, "gpt2 is none of llama"),
        (True, True, "llama", {"hidden_act": "gelu"}, "the activation is gelu instead of silu"),
    ],
)
def test_where_the_kernels_cannot_run_true_is_refused_and_auto_changes_nothing(
    monkeypatch, gpu, installed, family, changes, why
):
    model = small("llama")
    config = model.config if family == "llama" else small(family).config
    for key, value in changes.items():
        setattr(config, key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    with pytest.raises(ValueError, match=f"liger_kernels: true, but for a/model {why}.*auto"):
        liger.check_liger(True, config, "a/model")
    for wanted in ("auto", False):
        liger.check_liger(wanted, config, "a/model")
        model.config = config
        liger.use_liger(model, wanted)
        assert not replaced(model)


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("family", liger.FAMILIES)
def test_a_step_on_a_gpu_is_that_of_transformers(family, dtype, tolerance):
    model = small(family, dtype, "cuda")
    wanted = step(small(family, dtype, "cuda"))
    liger.use_liger(model, True)
    assert len(replaced(model)) >= 7
    assert distance(step(model), wanted) < tolerance
