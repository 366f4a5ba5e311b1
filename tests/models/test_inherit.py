"""A student of all blocks is its parent; of some, it has those, and all that is not a block."""

import pytest
import torch
from processes import start
from small import save_small, small_model, small_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kd.models.inherit import inherit

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARENTS = {
    "qwen2": lambda: small_model(small_tokenizer(), num_hidden_layers=3),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
}
IDS = torch.arange(3, 33)[None]


@pytest.mark.parametrize("name", PARENTS)
@torch.no_grad()
def test_all_blocks_give_the_parent_to_the_last_bit_saved_and_loaded_too(name, tmp_path):
    torch.manual_seed(0)
    parent = PARENTS[name]().eval()
    student = inherit(parent, [0, 1, 2])
    wanted = parent(IDS).logits
    assert torch.equal(student(IDS).logits, wanted)
    student.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted)


@torch.no_grad()
def test_some_blocks_are_the_parent_with_the_others_skipped():
    parent = PARENTS["qwen2"]().eval()
    student = inherit(parent, [0, 2])
    del parent.model.layers[1]
    assert torch.equal(student(IDS).logits, parent(IDS, use_cache=False).logits)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [0, 3], [-1, 2]])
def test_wrong_layers_are_refused(layers):
    with pytest.raises(ValueError, match="wanted increasing numbers from 0 to 2"):
        inherit(PARENTS["qwen2"](), layers)


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="gpt2: its blocks cannot be inherited yet"):
        inherit(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)), [0])


def test_the_script_saves_a_student_that_loads_with_its_tokenizer(tmp_path):
    save_small(tmp_path / "parent", num_hidden_layers=3)
    call = ("python", "train/inherit.py", "--parent", tmp_path / "parent", "--output_dir")
    done = start(*call, tmp_path / "student", "--layers", "0", "2")
    assert "blocks [0, 2] of 3" in done.stdout, done.stdout[-3000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template
    done = start(*call, tmp_path / "student", "--layers", "2", "7")
    assert done.returncode == 2 and "wanted increasing numbers" in done.stdout
