"""The memory plan against real models and formulas, and the choice of a micro-batch."""

import gc
import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from processes import ROOT
from published import save_config
from small import save_small, small_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from kd.losses.fused import linear_distillation_loss
from kd.losses.head import Head, TeacherOutputs
from kd.models.heads import (
    LossInputs,
    backbone_only,
    causal_lm,
    head_of,
    return_loss,
    target_positions,
)
from kd.models.load import load_trained, lora_config, parameter_counts
from kd.planning import memory
from kd.planning.activations import CannotTrace, LiveBytes, trace_activations, truncated
from kd.planning.blueprint import (
    build,
    build_trained,
    checkpoint_tensors,
    stored_tensors,
)
from kd.planning.device_rates import Rates
from kd.planning.fitting import changes_that_fit, fit
from kd.planning.layout import GIB, SPARE, Layout
from kd.planning.memory import plan_training
from kd.planning.model_sizes import student_tensors
from kd.planning.throughput import duration
from kd.pretrained import load_config
from kd.settings.distillation import ModelSettings, Objective

ZERO2, ZERO3, TEACHER_ZERO3 = (
    json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    for name in ("student_zero2", "student_zero3", "teacher_zero3")
)
KINDS = {
    "full": ModelSettings(dtype="float32"),
    "lora": ModelSettings(dtype="bfloat16", lora_rank=4),
    "lora on two modules": ModelSettings(
        dtype="float32", lora_rank=4, lora_target_modules=["q_proj", "v_proj"]
    ),
    "qlora": ModelSettings(dtype="bfloat16", lora_rank=4, quantization="nf4"),
}


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights, with bitsandbytes' scales but without its shared table of 256 codes."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = [state.absmax, state.code]
            scales += [state.state2.absmax, state.offset] if state.nested else []
            total += sum(tensor.numel() * tensor.element_size() for tensor in scales)
    return total


@pytest.mark.parametrize("student", ["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_student_is_counted_to_the_byte(kind, student, tokenizer, tmp_path):
    # 52 x 102 weights do not fill a whole number of blocks of 64.
    shape = {"hidden": 52, "intermediate_size": 102, "tie_word_embeddings": student == "tied"}
    folder = save_small(tmp_path / "model", tokenizer, **shape)
    real = load_trained(str(folder), KINDS[kind], tokenizer)
    dtype = getattr(torch, KINDS[kind].dtype)
    pieces = stored_tensors(build_trained(load_config(str(folder)), KINDS[kind], dtype, cast=False))
    assert sum(piece.bytes for piece in pieces) == held_bytes(real)
    trained = sum(piece.numel for piece in pieces if piece.trained)
    assert trained == parameter_counts(real)[0] > 0


def test_deepspeed_casts_adapters_to_half_precision(tokenizer, tmp_path):
    config = load_config(str(save_small(tmp_path / "model", tokenizer)))
    for cast, size in ((True, 2), (False, 4)):
        pieces = stored_tensors(build_trained(config, KINDS["lora"], torch.bfloat16, cast))
        assert {piece.itemsize for piece in pieces if piece.trained} == {size}
        assert {piece.itemsize for piece in pieces if not piece.trained} == {2}


@pytest.mark.parametrize("double", [True, False])
def test_nf4_teacher_is_counted_to_the_byte(double, tokenizer, tmp_path):
    folder = save_small(tmp_path / "plain", tokenizer, hidden=64)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    packed.save_pretrained(tmp_path / "nf4")
    pieces = checkpoint_tensors(load_config(str(tmp_path / "nf4")), "auto")
    assert sum(piece.bytes for piece in pieces) == held_bytes(packed)


def test_awq_teacher_of_experiment_d_has_the_bytes_of_its_format(tmp_path):
    """Written out for the published shapes: 4 bits, and a scale and a zero per 128 numbers."""
    hidden, blocks, kv, intermediate, vocab_size = 5120, 64, 1024, 27_392, 152_064
    linears = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate
    packed = linears // 2 + linears // 128 // 2 + linears // 128 * 2
    plain = 2 * (hidden + 2 * kv) + 2 * 2 * hidden  # biases of q, k, v; two norms; float16
    total = blocks * (packed + plain) + 2 * (2 * vocab_size * hidden + hidden)
    config = load_config(str(save_config(tmp_path, "Qwen/Qwen1.5-32B-Chat-AWQ")))
    assert sum(piece.bytes for piece in checkpoint_tensors(config, "auto")) == total


@pytest.mark.parametrize(("key_heads", "repeats_keys"), [(4, False), (2, False), (2, True)])
def test_activations_of_a_block_equal_a_count_by_hand(key_heads, repeats_keys):
    """Full float32 training with flash attention: what autograd saves per token of a block."""
    hidden, intermediate, heads, rows, length = 64, 160, 4, 3, 48
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=7,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )
    # A norm saves its input, the normalized input before and after the weight, and 1 / rms.
    norms = 2 * (3 * hidden + 1)
    # Query, output, key and value, and one normalizer per head.
    saved_heads = heads if repeats_keys else key_heads
    attention = 2 * hidden + 2 * saved_heads * (hidden // heads) + heads
    mlp = 4 * intermediate  # gate, its SiLU, up, their product
    expected = 4 * rows * length * (norms + attention + mlp)

    def kept(blocks: int, **options) -> float:
        shallow = truncated(config, blocks)
        return trace_activations(
            shallow,
            lambda c: build(c, torch.float32),
            rows,
            length,
            repeats_keys=repeats_keys,
            **options,
        ).kept

    assert kept(8) - kept(7) == expected
    # With checkpointing a block saves only its input.
    assert kept(8, checkpointing=True) - kept(7, checkpointing=True) == 4 * rows * length * hidden


ARCHITECTURES = {
    "qwen2": Qwen2Config,
    "qwen3": lambda **shape: Qwen3Config(head_dim=16, **shape),
    "llama": LlamaConfig,
    "gemma2": lambda **shape: Gemma2Config(head_dim=16, **shape),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_traced_activations_equal_those_of_a_real_run(architecture, kind, checkpointing, tmp_path):
    """The same model, with values, on this CPU: bytes of its live tensors, within 2%."""
    tokenizer = small_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    config = ARCHITECTURES[architecture](**shape)
    config.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    attention = "eager" if architecture == "gemma2" else "sdpa"  # sdpa has no soft-cap
    settings = replace(KINDS[kind], dtype="float32", attn_implementation=attention)
    rows, length = 2, 64
    config = load_config(str(tmp_path))
    traced = trace_activations(
        config,
        lambda c: build_trained(c, settings, torch.float32, cast=False),
        rows,
        length,
        checkpointing=checkpointing,
        device="cpu",
    )
    model = load_trained(str(tmp_path), settings, tokenizer).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.zeros(rows, length, dtype=torch.long)
    base.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    model.zero_grad()  # the first call also creates tables, which are not activations
    known = [*model.parameters(), *model.buffers()]
    with LiveBytes(known) as live:
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = live.now
        hidden.backward(torch.ones_like(hidden))
    assert traced.kept == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("teacher", [False, True])
def test_planned_loss_workspace_is_what_the_loss_allocates(teacher, tokenizer, tmp_path):
    vocab_size, width, tokens = 20_000, 16, 300
    shape = {"hidden": width, "vocab_size": vocab_size}
    name = str(save_small(tmp_path / "model", tokenizer, **shape))
    objective = Objective(soft_weight=0.5 if teacher else 0.0, loss_workspace_mb=128)
    layout = Layout(name, KINDS["lora"], 1, 1, tokens, 1, GIB, objective=objective, device="cpu")
    layout = replace(layout, teacher=name if teacher else None)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight, labels = torch.randn(vocab_size, width), torch.zeros(tokens, dtype=torch.long)
    outputs = TeacherOutputs(hidden.detach(), Head(weight)) if teacher else None
    with LiveBytes([hidden, weight, labels]) as live:
        linear_distillation_loss(hidden, labels, Head(weight), objective, vocab_size, outputs)
    gradient = 4 * hidden.numel()  # a separate part of the plan
    assert memory.loss_workspace(layout) == pytest.approx(live.peak - gradient, rel=0.1)


@pytest.fixture(scope="module")
def layout(models) -> Layout:
    """The small student and teacher on two processes with two gigabytes each."""
    return Layout(
        student=str(models / "student"),
        model=KINDS["full"],
        micro=16,
        accumulation=2,
        max_length=512,
        processes=2,
        memory=2 * GIB,
        teacher=str(models / "teacher"),
        zero=ZERO2,
    )


def test_parts_add_up_to_the_total(layout):
    found = plan_training(layout)
    assert sum(found.parts.values()) == pytest.approx(found.total)
    assert found.total == found.record()["total"] or abs(found.total - found.record()["total"]) < 1
    for part in found.parts:
        assert part in str(found)


def test_one_plan_does_not_change_the_next(layout):
    for time in (1, 2):
        assert plan_training(layout).total == plan_training(layout).total, time
        list(changes_that_fit(replace(layout, memory=3 * GIB), False))
        duration(layout, Rates(1, 1, 1))


def test_ddp_broadcasts_all_weights_at_its_start_frozen_ones_too(layout):
    lora = replace(layout, zero=None, model=ModelSettings(dtype="float32", lora_rank=4))
    weights = sum(piece.bytes for piece in student_tensors(lora))
    (copied,) = plan_training(replace(lora, processes=2)).phases["DDP's start"].values()
    assert copied == weights < 2 * 250 * 2**20
    assert "DDP's start" not in plan_training(replace(lora, processes=1)).phases
    assert "DDP's start" not in plan_training(replace(lora, processes=2, zero=ZERO2)).phases


def test_more_processes_share_a_sharded_teacher(layout, tokenizer, tmp_path):
    name = str(save_small(tmp_path / "model", tokenizer, hidden=512))
    sharded = replace(layout, teacher=name, teacher_shards=TEACHER_ZERO3)
    (whole,) = memory.teacher_held(replace(layout, teacher=name)).values()
    for processes in (2, 4, 8):
        (held,) = memory.teacher_held(replace(sharded, processes=processes)).values()
        assert whole / processes <= held < whole / processes + 0.02 * whole


@pytest.mark.parametrize("zero, copies", [(None, 0), (ZERO2, 4 / 2), (ZERO3, 4 / 2)])
def test_adam_under_zero_is_counted_to_the_byte(layout, zero, copies):
    """Two processes: two float32 moments; with DeepSpeed, a float32 copy of bfloat16 weights."""
    half = replace(layout, zero=zero, half="bfloat16", model=ModelSettings(dtype="bfloat16"))
    trained = parameter_counts(AutoModelForCausalLM.from_pretrained(layout.student))[0]
    parts = memory.optimizer_held(half, student_tensors(half))
    found = {name.split(" ")[0]: size for name, size in parts.items()}
    assert found["optimizer:"] == 8 * trained / (2 if zero else 1)
    assert found["float32"] == copies * trained


def test_the_micro_batch_is_the_largest_divisor_that_fits(layout):
    sizes = {micro: plan_training(replace(layout, micro=micro)).total for micro in (1, 2, 4, 8, 16)}
    assert sorted(sizes.values()) == list(sizes.values())
    for micro in (2, 4, 8):
        found = fit(replace(layout, memory=sizes[micro] / (1 - SPARE) + 1), fixed_batch=False)
        assert (found.layout.micro, found.layout.accumulation) == (micro, 32 // micro)


def test_a_given_micro_batch_is_not_changed(layout):
    layout = replace(layout, max_length=4096)
    total = plan_training(layout).total
    assert fit(replace(layout, memory=total / (1 - SPARE) + 1), fixed_batch=True).layout.micro == 16
    with pytest.raises(ValueError, match="--per_device_train_batch_size 1 "):
        fit(replace(layout, memory=0.999 * total), fixed_batch=True)


def test_a_run_that_cannot_fit_is_told_three_changes_that_make_it_fit(layout, tmp_path):
    layout = replace(
        layout,
        student=str(save_config(tmp_path / "student", "Qwen/Qwen2.5-0.5B")),
        teacher=str(save_config(tmp_path / "teacher", "Qwen/Qwen2.5-1.5B-Instruct")),
        model=ModelSettings(dtype="bfloat16"),
        half="bfloat16",
        memory=7 * GIB,
    )
    smallest = plan_training(replace(layout, micro=1))
    assert not smallest.fits
    with pytest.raises(ValueError, match="DOES NOT FIT") as error:
        fit(layout, fixed_batch=False)
    lines = str(error.value).split("cheapest first (each planned):\n")[1].splitlines()
    assert len(lines) == 3 and all("GiB" in line and "--" in line for line in lines)
    # One of them is LoRA, with which the same layout fits.
    assert any("--lora_rank 16" in line for line in changes_that_fit(layout, False))
    lora = replace(layout.model, lora_rank=16)
    assert fit(replace(layout, model=lora), fixed_batch=False).fits


def test_a_model_without_configuration_is_named(layout, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        plan_training(replace(layout, student=str(tmp_path)))


def test_a_model_whose_shapes_depend_on_values_cannot_be_planned(layout):
    def routed(config):
        model = build(config, torch.float32)
        model.model.norm.forward = lambda hidden: hidden[hidden.sum(-1) > 0]
        return model

    with pytest.raises(CannotTrace, match="Qwen2ForCausalLM"):
        trace_activations(load_config(layout.student), routed, 1, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_plan_is_within_ten_percent_of_a_gpus_peak(kind, checkpointing, tmp_path):
    """Two steps with the fused loss: student of Qwen2.5-0.5B's shapes, whole teacher of 1.5B's."""
    gc.collect()
    before = torch.cuda.memory_allocated()  # left over from earlier tests
    rows, length, vocab_size = 4, 1024, 151_936
    names = {"student": "Qwen/Qwen2.5-0.5B", "teacher": "Qwen/Qwen2.5-1.5B-Instruct"}
    folders = {role: save_config(tmp_path / role, name) for role, name in names.items()}
    settings = replace(KINDS[kind], dtype="bfloat16" if kind == "lora" else "float32")
    objective = Objective(soft_weight=1.0)
    layout = Layout(
        student=str(folders["student"]),
        model=settings,
        micro=rows,
        accumulation=1,
        max_length=length,
        processes=1,
        memory=torch.cuda.get_device_properties(0).total_memory,
        teacher=str(folders["teacher"]),
        objective=objective,
        half="bfloat16",
        checkpointing=checkpointing,
    )
    dtype = getattr(torch, settings.dtype)
    student = AutoModelForCausalLM.from_config(load_config(layout.student), dtype=dtype).cuda()
    if kind == "lora":
        student = get_peft_model(student, lora_config(settings, None))
    teacher = AutoModelForCausalLM.from_config(load_config(layout.teacher), dtype=torch.bfloat16)
    teacher.cuda().eval().requires_grad_(False)
    backbone_only(teacher)
    return_loss(causal_lm(student))
    if checkpointing:
        student.enable_input_require_grads()
        student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids = torch.randint(vocab_size, (rows, length), device="cuda")
    positions = torch.arange(length, device="cuda").expand(rows, length)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.no_grad():
            states = teacher(input_ids=ids, position_ids=positions)
        outputs = TeacherOutputs(states[target_positions(ids)[0]], head_of(teacher))
        inputs = LossInputs(ids, objective, vocab_size, outputs)
        with torch.autocast("cuda", torch.bfloat16):
            loss = student(input_ids=ids, position_ids=positions, loss_inputs=inputs)["loss"]
        del states, outputs, inputs
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    planned = sum(
        size for part, size in plan_training(layout).parts.items() if "allowance" not in part
    )
    assert planned == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
