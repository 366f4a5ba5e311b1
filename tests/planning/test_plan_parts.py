"""Single parts of the plan of a small layout, against their definitions."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from processes import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from kd.models.heads import backbone_only, causal_lm
from kd.models.load import lora_config, parameter_counts
from kd.planning import memory, throughput
from kd.planning.activations import LiveBytes
from kd.planning.disk import disk_bytes
from kd.planning.layout import GIB, Layout
from kd.planning.memory import plan_training
from kd.planning.model_sizes import student_tensors
from kd.planning.throughput import (
    matrix_work,
    model_operations_per_token,
    operations,
    optimizer_bytes,
    unpacked_bytes,
)
from kd.settings.distillation import ModelSettings, OnPolicySettings

ZERO2, ZERO3 = (
    json.loads((ROOT / f"ds_configs/student_{name}.json").read_text())
    for name in ("zero2", "zero3")
)
FULL = ModelSettings(dtype="float32", attn_implementation="eager")
LORA = ModelSettings(dtype="float32", attn_implementation="eager", lora_rank=4)
ROWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def layout(models) -> Layout:
    return Layout(
        student=str(models / "student"),
        model=FULL,
        micro=ROWS,
        accumulation=1,
        max_length=LENGTH,
        processes=2,
        memory=GIB,
    )


@pytest.fixture(scope="module")
def weights(models) -> int:
    """The number of trained weights in full training."""
    return parameter_counts(AutoModelForCausalLM.from_pretrained(models / "student"))[0]


def part(layout: Layout, name: str) -> float:
    parts = memory.optimizer_held(layout, student_tensors(layout))
    return next(size for key, size in parts.items() if key.startswith(name))


@pytest.mark.parametrize(
    "zero, processes, accumulation, gradients, buckets",
    [
        (None, 1, 1, 0, 0),  # gradients replace activations
        (None, 1, 2, 1, 0),
        (None, 2, 2, 1, 1),
        (ZERO2, 2, 1, 0, 0),
        (ZERO2, 2, 2, 1 / 2, 0),
        (ZERO3, 2, 1, 1 / 2, 0),
        (ZERO3, 4, 2, 1 / 4, 0),
    ],
)
def test_persistent_gradients_and_ddps_buckets(
    layout, weights, zero, processes, accumulation, gradients, buckets
):
    changed = replace(layout, zero=zero, processes=processes, accumulation=accumulation)
    assert part(changed, "gradients") == 4 * weights * gradients
    assert part(changed, "DDP's buckets") == 4 * weights * buckets


@pytest.mark.parametrize("zero, copies", [(None, 0), (ZERO2, 4 / 2), (ZERO3, 0)])
def test_only_zero_2_copies_float32_weights(layout, weights, zero, copies):
    assert part(replace(layout, zero=zero), "float32 copies") == copies * weights


def test_a_paged_optimizer_is_in_host_memory(layout, weights):
    paged = replace(layout, zero=ZERO2, optimizer="paged_adamw_32bit", device="cuda")
    assert part(paged, "optimizer") == 0
    assert part(replace(paged, optimizer="adamw_torch"), "optimizer") == 8 * weights / 2
    assert memory.host_parts(paged, student_tensors(paged))["paged optimizer"] == 8 * weights
    alone = replace(paged, zero=None)
    assert memory.host_parts(alone, student_tensors(alone))["paged optimizer"] == 2 * 8 * weights


def test_hidden_states_of_a_sharded_teacher_fill_at_most_its_workspace(layout, models):
    one = 2 * ROWS * LENGTH * 48 * 4  # bytes of a micro-batch: two copies, float32
    taught = replace(layout, teacher=str(models / "teacher"), accumulation=4)
    assert memory.teacher_states(taught) == one
    sharded = replace(taught, teacher_shards=ZERO3)
    for workspace, states in ((0, one), (2.5 * one, 2.5 * one), (9 * one, 4 * one)):
        assert memory.teacher_states(replace(sharded, teacher_workspace=workspace)) == states
    assert memory.teacher_states(replace(taught, hidden_pairs=3)) == one / 2 * 5


def test_generation_counts_the_chosen_rows_and_gathers_a_sharded_student(layout):
    settings = OnPolicySettings(student_fraction=0.25)
    writing = replace(layout, micro=4, accumulation=3, on_policy=settings)
    assert memory.on_policy_rows(writing) == 6  # a quarter of 24, all on one process
    assert memory.on_policy_rows(replace(writing, processes=8)) == 12  # no more than it has
    for zero, whole in ((ZERO2, 0.0), (ZERO3, sum(p.bytes for p in student_tensors(layout)))):
        phase = plan_training(replace(writing, zero=zero)).phases["the student's generation"]
        assert phase["student gathered for generation"] == whole


def test_generation_takes_what_is_planned_for_its_cache_and_the_prompts(layout, models):
    """Long prompts and short answers: the first forward takes most."""
    rows = 4
    model = AutoModelForCausalLM.from_pretrained(models / "student", attn_implementation="eager")
    ids = torch.randint(300, (rows, LENGTH - 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers()]) as live:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    writing = replace(
        layout, micro=rows, device="cpu", on_policy=OnPolicySettings(student_fraction=1.0)
    )
    phase = memory.generation_phase(writing, student_tensors(layout))
    assert phase["activations of the prompts"] > sum(phase.values()) / 2
    assert 0.8 < live.peak / sum(phase.values()) <= 1


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_operations_of_a_step_equal_those_that_pytorch_counts(layout, models, settings):
    """PyTorch counts all of attention, causal attention is half; LoRA's first block needs less."""
    model = AutoModelForCausalLM.from_pretrained(models / "student", attn_implementation="eager")
    if settings.lora_rank:
        model = get_peft_model(model, lora_config(settings, None))
    backbone_only(causal_lm(model))
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 300
    found = operations(replace(layout, model=settings))
    attention = 2 * LENGTH * 32 * 2 * ROWS * LENGTH  # 32 wide, two blocks
    with FlopCounterMode(display=False) as forward:
        hidden = model(input_ids=ids)
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    if not settings.lora_rank:
        assert forward.get_total_flops() == found["student's forward"] + attention
        assert backward.get_total_flops() == found["student's backward"] + 2 * attention
        return
    # The plan counts the adapters' forward with their backward: 6 operations instead of 2 and 4.
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert found["student's forward"] + found["student's backward"] == pytest.approx(
        counted - 3 * attention, rel=0.1
    )


def test_a_teacher_and_a_trained_head_add_operations_of_the_head(layout, models):
    vocab_size = AutoModelForCausalLM.from_pretrained(models / "student").config.vocab_size
    one = 2 * ROWS * LENGTH * vocab_size  # per element of H
    taught = replace(layout, teacher=str(models / "teacher"))
    for changed, numbers in (
        (layout, 3 * 32),
        (replace(layout, model=LORA), 2 * 32),
        (taught, 3 * 32 + 48),
        (replace(taught, accumulation=5), 5 * (3 * 32 + 48)),
    ):
        assert operations(changed)["heads and loss"] == one * numbers
    again = operations(replace(layout, checkpointing=True))
    assert again["student's forward again (checkpointing)"] == again["student's forward"]


def test_bytes_moved_by_unpacking_and_by_the_optimizer(layout, weights):
    assert optimizer_bytes(layout) == (2 * 8 + 16) * weights
    assert optimizer_bytes(replace(layout, zero=ZERO2)) == (2 * 8 + 16) * weights / 2
    packed = replace(layout, model=replace(LORA, quantization="nf4", dtype="bfloat16"))
    frozen = sum(piece.bytes for piece in student_tensors(packed) if not piece.trained)
    assert unpacked_bytes(layout) == 0 and unpacked_bytes(packed) == 2 * 9 * frozen
    assert unpacked_bytes(replace(packed, checkpointing=True, accumulation=2)) == 6 * 9 * frozen


def test_disk_space_of_models_checkpoints_and_result(layout, weights):
    for zero, module in ((None, 0), (ZERO2, 4)):
        parts = disk_bytes(replace(layout, zero=zero), 3)
        assert parts["3 checkpoints"] == 3 * weights * (4 + 4 + 8 + module)
        assert parts["the trained model"] == 4 * weights
        assert parts["student from the hub"] == 2 * weights


def test_model_operations_are_six_n_of_the_student_and_two_n_of_the_teacher(layout, models):
    """N by hand: q, k, v, o and three matrices of the MLP in two blocks, and the head."""

    def count(hidden: int, vocab_size: int) -> int:
        keys = hidden // 2  # two of the four heads
        block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * 2 * hidden
        return 2 * block + vocab_size * hidden

    student = AutoConfig.from_pretrained(models / "student").vocab_size
    teacher = AutoConfig.from_pretrained(models / "teacher").vocab_size
    alone = model_operations_per_token(layout)
    assert alone == 6 * count(32, student)
    pair = replace(layout, teacher=str(models / "teacher"))
    assert model_operations_per_token(pair) == alone + 2 * count(48, teacher)
    for changed in (replace(pair, checkpointing=True), replace(pair, model=LORA)):
        assert model_operations_per_token(changed) == model_operations_per_token(pair)


def test_utilization_needs_a_gpu_half_precision_and_the_vendors_rate(layout, monkeypatch):
    monkeypatch.setattr(throughput, "matrix_rate", lambda device, dtype: 4e11)
    gpu, half = torch.device("cuda"), replace(layout, half="bfloat16")
    assert matrix_work(half, torch.device("cpu"), 65.0) is None
    assert matrix_work(half, gpu, 65.0).vendor_rate == 65e12
    assert matrix_work(half, gpu, 65.0).measured_rate == 4e11
    assert matrix_work(half, gpu, None).vendor_rate is None  # no machine file
    assert matrix_work(layout, gpu, 65.0).vendor_rate is None  # the vendor's is for half precision
