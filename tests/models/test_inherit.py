"""A student with all layers equals its parent; otherwise it has the chosen layers and the rest."""

import json

import pytest
import torch
from small import save_small, small_model, small_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from kd.models.inherit import (
    ARCHITECTURES,
    check_parent,
    even,
    first,
    inherit,
    inherited_pairs,
    last,
    parent_config,
    student_config,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 5, "head_dim": 8}  # shorter than the 30 tokens of IDS
PATTERN = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, **SLIDING, use_sliding_window=True, max_window_layers=2),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "mistral": MistralConfig(**SIZES, **SLIDING),
    "gemma2": Gemma2Config(**SIZES, **SLIDING, query_pre_attn_scalar=8),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, **SLIDING, layer_types=PATTERN, query_pre_attn_scalar=8
    ),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(**SIZES, sliding_window=5, layer_types=PATTERN),
    "phi3": Phi3Config(
        **SIZES, sliding_window=5, original_max_position_embeddings=32, rope_parameters=LONG
    ),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 1]),
}
IDS = torch.arange(3, 33)[None]


def parent_of(name: str) -> PreTrainedModel:
    """A parent with random weights, norms included: fresh norms are all ones and look alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def test_every_supported_architecture_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_student_with_all_layers_equals_the_parent_bit_for_bit_also_when_loaded(name, tmp_path):
    parent = parent_of(name)
    student = inherit(parent, [0, 1, 2, 3])
    expected = parent(IDS).logits
    assert torch.equal(student(IDS).logits, expected)
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected)
    # Inheriting from a student works as well.
    assert torch.equal(inherit(student, [0, 1, 2, 3])(IDS).logits, expected)


@pytest.mark.parametrize("layers", [[0, 3], [1, 2, 3], [2]])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_student_equals_the_parent_with_the_other_layers_skipped(name, layers, tmp_path):
    """Each layer keeps its window, rotary embedding and mask at its new position."""
    parent = parent_of(name)
    student = inherit(parent, layers)
    for n in set(range(4)) - set(layers):
        parent.model.layers[n].forward = lambda hidden_states, *_, **__: hidden_states
    expected = parent(IDS, use_cache=False).logits
    assert torch.equal(student(IDS).logits, expected)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, expected)
    new = loaded.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    # With a cache, whose layers depend on the configuration.
    assert new[0, 30] == expected[0, -1].argmax()


def test_configuration_values_per_layer_move_with_their_layers():
    config = student_config(CONFIGS["smollm3"], [1, 3], "parent")
    assert config.no_rope_layers == [0, 1] and len(config.layer_types) == 2
    config = student_config(CONFIGS["qwen2"], [0, 2, 3], "parent")
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.max_window_layers == 1  # Qwen's own key
    assert CONFIGS["qwen2"].num_hidden_layers == 4  # the parent's is unchanged


def test_the_choices_select_distinct_layers_evenly():
    assert first(3, 6) == [0, 1, 2] and last(3, 6) == [3, 4, 5]
    assert even(3, 6) == [0, 2, 5] and even(6, 26) == [0, 5, 10, 15, 20, 25] and even(1, 9) == [0]
    for depth in range(2, 41):
        for keep in range(2, depth + 1):
            layers = even(keep, depth)
            gaps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
            assert layers[0] == 0 and layers[-1] == depth - 1 and len(layers) == keep
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_the_layer_map_of_an_inherited_student_follows_its_layers(tmp_path):
    parent = parent_of("llama")
    inherit(parent, [0, 2]).save_pretrained(tmp_path)
    student = AutoConfig.from_pretrained(tmp_path)
    assert student.inherited["layers"] == [0, 2] and student.inherited["of"] == 4
    assert inherited_pairs(student, parent.config) == [
        "1:1",
        "2:4",
    ]  # the last to the last
    assert inherited_pairs(parent.config, parent.config) is None
    assert inherited_pairs(student, LlamaConfig(**SIZES | {"num_hidden_layers": 5})) is None
    grown = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    assert inherited_pairs(grown, parent.config) is None


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [0, 4], [-1, 2]])
def test_wrong_layers_are_rejected(layers):
    with pytest.raises(ValueError, match="wanted increasing numbers from 0 to 3"):
        inherit(parent_of("llama"), layers)


@pytest.mark.parametrize(
    "config, message",
    [
        (GPT2Config(n_layer=2), "gpt2: its layers cannot be inherited, because nobody has checked"),
        (Qwen3MoeConfig(), "qwen3_moe: .* because it is a mixture of experts"),
        (Gemma3Config(), "gemma3: a multimodal model"),
        (LlamaConfig(quantization_config={"quant_method": "awq"}), "quantized .awq.*it was made"),
    ],
)
def test_unsupported_parents_are_rejected_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        check_parent(config)


def test_a_four_bit_parent_is_rejected_before_and_after_it_is_loaded(tmp_path):
    save_small(tmp_path / "parent")
    parent = AutoModelForCausalLM.from_pretrained(
        tmp_path / "parent", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    parent.save_pretrained(tmp_path / "nf4")
    for attempt in (lambda: parent_config(str(tmp_path / "nf4")), lambda: inherit(parent, [0])):
        with pytest.raises(ValueError, match="quantized .bitsandbytes.*that it was made"):
            attempt()


def test_an_adapter_is_rejected_with_the_command_that_merges_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="train/merge.py --adapter"):
        parent_config(str(tmp_path))


@torch.no_grad()
def test_a_parent_stored_in_several_files_gives_the_same_student(tmp_path):
    model = small_model(small_tokenizer(), num_hidden_layers=3).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    student = inherit(AutoModelForCausalLM.from_pretrained(tmp_path), [0, 2])
    assert torch.equal(student(IDS).logits, inherit(model, [0, 2])(IDS).logits)


def test_the_student_inherits_copies_of_the_dtype_and_generation_config():
    parent = parent_of("llama").to(torch.bfloat16)
    parent.generation_config.update(eos_token_id=[2, 7], repetition_penalty=1.3)
    student = inherit(parent, [0, 2])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config.dtype == torch.bfloat16 and not student.training
    student.generation_config.update(repetition_penalty=2.0)
    student.config.rope_parameters["rope_theta"] = 5.0
    assert student.generation_config.eos_token_id == [2, 7]
    assert parent.generation_config.repetition_penalty == 1.3
    assert parent.config.rope_parameters["rope_theta"] != 5.0
    assert parent.config.num_hidden_layers == 4 and not hasattr(parent.config, "inherited")
    student.model.layers[1].mlp.up_proj.weight.data.zero_()  # no weight is shared
    assert parent.model.layers[2].mlp.up_proj.weight.abs().max() > 0
