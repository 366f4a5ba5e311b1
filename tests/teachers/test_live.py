"""One forward over several micro-batches gives bit-identical results to separate forwards."""

import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small import save_small, small_rows
from transformers import AutoConfig, AutoModelForCausalLM

from kd.data.encoding import IGNORE_INDEX, EncodedRow, encode_rows
from kd.data.packing import Collator, pack, side_by_side
from kd.models.blocks import blocks_in_parts, decoder_blocks
from kd.models.load import load_trained
from kd.settings.distillation import ModelSettings
from kd.settings.teacher import TeacherSettings
from kd.teachers.live import LiveTeacher, groups

CPU = torch.device("cpu")
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3", "olmo2", "gpt2")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}


def micro_batches(tokenizer, packed: bool = False) -> list[dict[str, torch.Tensor]]:
    """Four micro-batches of different sizes; one has no target token."""
    rows, _ = encode_rows(small_rows(12), tokenizer, 512)
    blank = EncodedRow.from_labels(rows[0].input_ids, [IGNORE_INDEX] * len(rows[0]))
    collate = Collator(tokenizer.pad_token_id)
    if packed:
        short, long = (
            [bin_ for bin_ in pack(rows, length) if len(bin_) > 1] for length in (200, 260)
        )
        return [collate(short[:1]), collate(long[:2])]
    alone = [[row] for row in rows]
    return [collate(alone[:2]), collate(alone[2:3]), collate([[blank]]), collate(alone[3:7])]


def save_architecture(folder, name: str, tokenizer) -> str:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer) + 7, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def load(folder, attention: str = "sdpa", **settings) -> LiveTeacher:
    given = TeacherSettings(**{"teacher": str(folder), "teacher_dtype": "float32"} | settings)
    return LiveTeacher(given, ModelSettings(attn_implementation=attention), CPU)


def check_equal(together: list[tuple], alone: list[tuple]) -> None:
    assert len(together) == len(alone)
    for (hidden, layers), (expected, expected_layers) in zip(together, alone, strict=True):
        assert torch.equal(hidden, expected)
        assert len(layers) == len(expected_layers)
        assert all(torch.equal(a, b) for a, b in zip(layers, expected_layers, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_forward_over_micro_batches_is_bit_identical_to_separate_ones(
    tmp_path, tokenizer, name, dtype
):
    attention = "eager" if name == "gemma2" else "sdpa"  # gemma2 supports no other
    teacher = load(save_architecture(tmp_path, name, tokenizer), attention, teacher_dtype=dtype)
    batches, layers = micro_batches(tokenizer), [0, 2, 3]
    alone = [teacher.states([batch], layers)[0] for batch in batches]
    assert [len(hidden) > 0 for hidden, _ in alone] == [True, True, False, True]
    check_equal(teacher.states(batches, layers), alone)


def test_one_forward_over_packed_micro_batches_is_bit_identical_to_separate_ones(
    tmp_path, tokenizer
):
    teacher = load(save_architecture(tmp_path, "qwen2", tokenizer))
    batches = micro_batches(tokenizer, packed=True)
    assert batches[0]["input_ids"].shape[1] != batches[1]["input_ids"].shape[1]
    alone = [teacher.states([batch], [1])[0] for batch in batches]
    check_equal(teacher.states(batches, [1]), alone)


def test_blocks_see_one_micro_batch_at_a_time_and_are_restored_afterwards(tmp_path, tokenizer):
    teacher = load(save_architecture(tmp_path, "qwen2", tokenizer))
    wide, shapes = side_by_side(micro_batches(tokenizer)), []
    pieces = [tuple(batch["input_ids"].shape) for batch in micro_batches(tokenizer)]
    for layer in (teacher.module.model.layers[1].mlp, teacher.module.model.norm):
        forward = layer.forward
        layer.forward = lambda x, forward=forward: shapes.append(tuple(x.shape[:2])) or forward(x)
    with torch.no_grad(), blocks_in_parts(teacher.module, pieces):
        teacher.call(input_ids=wide["input_ids"], position_ids=wide["position_ids"])
    assert shapes == [*pieces, *pieces]
    # A forward of an instance, such as a kernel's, is there again.
    del teacher.module.model.layers[1].mlp.forward, teacher.module.model.norm.forward
    assert not any("forward" in vars(module) for module in teacher.module.model.modules())


def test_a_model_whose_blocks_are_not_found_is_refused():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    config = AutoConfig.for_model("roberta", vocab_size=320, is_decoder=True, **sizes)
    with pytest.raises(ValueError, match=r"RobertaForCausalLM \(roberta\): .* no layers or h;"):
        decoder_blocks(AutoModelForCausalLM.from_config(config))


def test_states_are_freed_after_their_micro_batch(models, tokenizer):
    teacher = load(models / "teacher")
    teacher.passes = lambda batches, layers: [(0, len(batches), False)]
    kept = []
    for context in teacher.outputs(micro_batches(tokenizer), [1]):
        with context as (outputs, states):
            kept.append([weakref.ref(outputs.hidden), weakref.ref(states[0])])
        del outputs, states
        assert all(ref() is None for refs in kept for ref in refs)
    assert len(kept) == 4


def test_micro_batches_are_grouped_until_the_workspace_is_full():
    shapes = [[2, 8], [2, 16], [2, 8], [2, 40], [1, 8], [1, 8]]
    assert list(groups(shapes, 64)) == [(0, 2, 64), (2, 3, 16), (3, 4, 80), (4, 6, 16)]
    assert [end - start for start, end, _ in groups(shapes, 0)] == [1] * 6
    assert list(groups(shapes, 10**9)) == [(0, 6, 10 * 40)]


def test_an_unmerged_adapter_gives_the_logits_of_peft(tmp_path, models, tokenizer):
    """LoRA on all layers and on the template's tokens, which the tied head shares."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, target_modules="all-linear", trainable_token_indices=[1, 2], task_type="CAUSAL_LM"
    )
    base = AutoModelForCausalLM.from_pretrained(models / "student")
    made = get_peft_model(base, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models / "student"), tmp_path
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(models / "student").eval()
    teacher = load(tmp_path)
    assert not any(p.requires_grad for p in teacher.module.parameters())
    batch = micro_batches(tokenizer)[0]
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    positions = batch["labels"][:, 1:] != IGNORE_INDEX
    with torch.no_grad(), teacher.batch_outputs(batch) as (outputs, _):
        found = outputs.head.logits(outputs.hidden, len(tokenizer))
        expected, without = (
            m(**inputs).logits[:, :-1, : len(tokenizer)][positions] for m in (peft, plain)
        )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert (expected - without).abs().max() > 0.1


def test_the_students_frozen_base_has_no_adapters_no_dropout_and_no_second_copy(
    tmp_path, tokenizer
):
    save_small(tmp_path, tokenizer, attention_dropout=0.3)
    plain = load(tmp_path)
    batch = micro_batches(tokenizer)[0]
    with plain.batch_outputs(batch, [0, 1, 2]) as (expected, expected_layers):
        pass
    settings = ModelSettings(
        dtype="float32", lora_rank=4, lora_dropout=0.5, train_template_tokens=True
    )
    student = load_trained(str(tmp_path), settings, tokenizer)
    for name, parameter in student.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    student.gradient_checkpointing_enable()
    student.train()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    own = LiveTeacher(TeacherSettings(teacher="self"), settings, CPU, student)
    assert {id(p) for p in own.module.parameters()} <= {id(p) for p in student.parameters()}
    random = torch.get_rng_state()
    for _ in range(2):
        with own.batch_outputs(batch, [0, 1, 2]) as (found, layers):
            assert torch.equal(found.hidden, expected.hidden)
            assert torch.equal(found.head.weight, expected.head.weight)
            assert all(torch.equal(a, b) for a, b in zip(layers, expected_layers, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert student.training and not any("forward" in vars(m) for m in own.module.model.modules())
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
    assert any(found.head.weight is parameter for parameter in student.parameters())


def test_an_adapter_that_replaces_the_head_is_refused(tmp_path, models):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(models / "teacher")
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="python train/merge.py --adapter"):
        load(tmp_path)
