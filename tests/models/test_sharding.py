"""A sharded teacher equals the whole one bit for bit; each rank holds and reads only its share."""

import json
import shutil

import pytest
import torch
from processes import start
from safetensors.torch import load_file, save_file
from scripts import quantize
from small import save_small, small_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from kd.models import awq
from kd.models.sharding import engine_settings, load_unsharded

SIZES = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
ARCHITECTURES = {  # with untied heads unless a comment says otherwise
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),  # tied, soft-capped
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),  # fused qkv
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
}
FORMATS = ("bf16", "awq", "nf4")
GROUP = 32
# DeepSpeed's thresholds for whole small tensors and for prefetching, scaled to these models.
DEEPSPEED = {
    "stage": 3,
    "stage3_prefetch_bucket_size": 20_000,
    "stage3_max_live_parameters": 40_000,
    "stage3_param_persistence_threshold": 100,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Checkpoints of every architecture and format, and broken ones in bad/."""
    work = tmp_path_factory.mktemp("sharding")
    save_small(work / "student", hidden=64)
    (work / "teacher.json").write_text(json.dumps({"zero_optimization": DEEPSPEED}))
    (work / "good").mkdir()
    for name, build in ARCHITECTURES.items():
        torch.manual_seed(0)
        plain = work / "good" / f"{name}-bf16"
        build().to(torch.bfloat16).save_pretrained(plain, max_shard_size="60KB")
        small_tokenizer().save_pretrained(plain)
        quantize(plain, work / "good" / f"{name}-awq", GROUP)
        write_nf4(plain, work / "good" / f"{name}-nf4", nested=name != "llama")
    write_gptq(work / "good" / "qwen2-awq", work / "good" / "qwen2-gptq")
    break_checkpoints(work)
    break_students(work)
    return work


def write_nf4(plain, folder, nested: bool) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested
    )
    AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=settings, attn_implementation="eager"
    ).save_pretrained(folder)


def write_gptq(source, folder) -> None:
    """Repack an AWQ checkpoint in the GPTQ layout."""
    shutil.copytree(source, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    shifts = 4 * torch.arange(8)
    for name in [key for key in tensors if key.endswith("qweight")]:
        numbers = awq.unpack(tensors[name]).unflatten(0, (-1, 8))  # (in / 8, 8, out)
        tensors[name] = (numbers.long() << shifts[:, None]).sum(1).to(torch.int32)
        zeros = (awq.unpack(tensors[name.replace("qweight", "qzeros")]) - 1) & 15
        packed = (zeros.unflatten(1, (-1, 8)).long() << shifts).sum(-1).to(torch.int32)
        tensors[name.replace("qweight", "qzeros")] = packed
        rows = torch.arange(numbers.numel() // numbers.shape[-1], dtype=torch.int32)
        tensors[name.replace("qweight", "g_idx")] = rows // GROUP
    save_file(tensors, file)
    index = {"weight_map": dict.fromkeys(tensors, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    (folder / "config.json").write_text(json.dumps(config))


def break_students(work) -> None:
    """Write damaged students into students/, and one with a tensor too many."""
    more = {
        "model.layers.7.mlp.up_proj.weight": torch.ones(3),
        "rotary_emb.inv_freq": torch.ones(3),
    }
    for name, change in (
        ("surplus tensors", lambda tensors: tensors.update(more)),
        ("missing tensor", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        ("wrong shape", lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
    ):
        folder = shutil.copytree(work / "student", work / "students" / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def break_checkpoints(work) -> None:
    """Write one checkpoint for each key of EXPECTED_ERRORS except "reading"."""
    bad = work / "bad"
    bad.mkdir()

    def copy(name: str, source: str = "qwen2-awq") -> tuple:
        folder = shutil.copytree(work / "good" / source, bad / name)
        return folder, sorted(folder.glob("*.safetensors"))

    _, files = copy("torn")
    files[0].write_bytes(files[0].read_bytes()[:-1000])
    _, files = copy("missing file", "qwen2-bf16")
    files[1].unlink()
    for name, change in (
        ("missing tensor", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales")),
        ("wrong shape", lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
    ):
        folder, files = copy(name)
        tensors = load_file(files[0])
        change(tensors)
        save_file(tensors, files[0])
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, files[0].name)}))
    _, files = copy("torn on one machine/1")
    files[0].write_bytes(files[0].read_bytes()[:-1000])
    for machine in "02":
        copy(f"torn on one machine/{machine}")
    folder, _ = copy("fp8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    Qwen3MoeConfig(**SIZES).save_pretrained(bad / "experts")


EXPECTED_ERRORS = {
    "torn": ["model-00001-of-00001.safetensors", "up to the end of", "fetch it again"],
    "missing file": ["model-00002-of-", "missing"],
    "missing tensor": ["model.layers.1.mlp.up_proj.scales"],
    "wrong shape": ["model-00001-of-00001.safetensors", "model.norm.weight is (63,); wanted (64,)"],
    "torn on one machine": ["one machine/1", "fetch it again", "(rank 1)"],
    "fp8": ["fp8 weights", "python train/quantize.py"],
    "experts": ["mixture of experts", "leave teacher_deepspeed out"],
    "reading": [".safetensors", "cannot be read", "the disk gave up", "(rank 1)"],
}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(work, request) -> list[dict]:
    """The results of every rank."""
    ranks = request.param
    job = start(
        "torchrun", "--nproc-per-node", ranks, "tests/jobs/sharded_teacher.py", work, timeout=900
    )
    files = [work / f"{ranks}-{rank}.json" for rank in range(ranks)]
    assert all(file.is_file() for file in files), job.stdout[-6000:]
    return [json.loads(file.read_text()) for file in files]


def test_logits_equal_those_of_the_whole_teacher_bit_for_bit(found):
    """Row lengths differ between ranks, one has no targets, and a student runs in between."""
    for rank in found:
        assert len(rank["good"]) == len(ARCHITECTURES) * len(FORMATS) + 4
        assert {k: v["differences"] for k, v in rank["good"].items() if any(v["differences"])} == {}
        assert all(v["spread"] > 0.3 for v in rank["good"].values())


def test_every_forward_gathers_whole_blocks(found):
    """Not single tensors, even in the first forward; DeepSpeed's module trace stays valid."""
    for rank in found:
        for name, model in rank["good"].items():
            first, _, third = model["gathers"]
            assert first < model["tensors"] / 2, (name, model["gathers"])
            assert third <= min(first, model["blocks"] + 3), (name, model["gathers"])


def test_a_rank_holds_and_reads_its_share_and_sends_nothing(found):
    for name in found[0]["good"]:
        # In "node" the last rank is a node of its own.
        for group in (found[:-1], found[-1:]) if name == "node" else (found,):
            check_shares(name, [rank["good"][name] for rank in group])


def check_shares(name: str, models: list[dict]) -> None:
    """Check the shares of the ranks that have one teacher together."""
    size = models[0]["checkpoint"]
    # Each byte is read once, except the few bytes that describe an NF4 layer.
    excess = sum(model["read"] for model in models) - size
    assert 0 <= excess < 0.05 * size if "nf4" in name else excess == 0, name
    for model in models:
        # The share of each tensor is rounded up to whole numbers of at most 4 bytes.
        assert model["held"] <= size / len(models) + 4 * 100, (name, model)
        assert model["sent"] == 0, name
        if name not in ("teacher_zero3", "teacher_zero3_offload"):  # these keep all whole
            assert model["kept whole"] < 0.1 * size, (name, model)


def test_every_tensor_keeps_the_type_of_its_file(found):
    for name, model in found[0]["good"].items():
        packed = {"bf16": [], "awq": ["float16", "int32"], "nf4": ["float32", "uint8"]}
        packed["gptq"] = packed["awq"]
        if "-" in name:
            types = sorted(["bfloat16", *packed[name.split("-")[1]]])
            assert model["types"] == [f"torch.{dtype}" for dtype in types], name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "has ZeRO stage 2; wanted 3"),
        ({"bf16": {"enabled": True}}, "has a bf16 section, which would cast"),
        *(
            ({"zero_optimization": {"stage": 3, key: value}}, f"has {key}, with which DeepSpeed")
            for key, value in (
                ("zero_hpz_partition_size", 2),
                ("mics_shard_size", 2),
                ("zero_quantized_weights", True),
                ("zero_quantized_nontrainable_weights", True),
            )
        ),
    ],
)
def test_zero3_settings_that_would_spoil_a_frozen_model_are_refused(sections, message, tmp_path):
    file = tmp_path / "teacher.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}} | sections))
    with pytest.raises(ValueError, match=message):
        engine_settings(str(file))


def test_the_same_numbers_packed_as_awq_and_as_gptq_have_the_same_logits(work):
    folder, ids = work / "good", torch.arange(3, 40)[None]
    one, other = (
        load_unsharded(str(folder / name), "sdpa", "auto", torch.device("cpu"))
        for name in ("qwen2-awq", "qwen2-gptq")
    )
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_tensors_that_a_student_under_zero3_lacks_or_has_too_many_are_told(found):
    """Transformers fills missing tensors at random and does not tell surplus ones.

    Only rank 0 reads the shapes.
    """
    for rank in found:
        assert (
            "lack 1 tensor: model.layers.1.mlp.up_proj.weight" in rank["students"]["missing tensor"]
        )
        assert "size mismatch for model.norm.weight" in rank["students"]["wrong shape"]
    told = [rank["students"]["surplus tensors"] for rank in found]
    assert (
        "1 tensor was not read, because the model has no such parameter: model.layers.7" in told[0]
    )
    assert not any("not read" in other for other in told[1:])


def test_errors_about_broken_checkpoints_are_raised_on_every_rank(found):
    for rank in found:
        assert set(rank["bad"]) == set(EXPECTED_ERRORS)
        for name, parts in EXPECTED_ERRORS.items():
            text = rank["bad"][name]
            assert not [part for part in parts if part not in text], (name, text)
