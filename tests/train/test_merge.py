"""train/merge.py on LoRA and QLoRA adapters that were trained for one step."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import succeed
from scripts import run_main
from small import CHATML, save_small, small_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kd.models.card import read_run
from kd.models.gguf import compare_gguf
from kd.models.load import disable_cpu_repacking, load_trained, nf4_config
from kd.settings.distillation import ModelSettings

IDS = torch.arange(3, 51).view(2, 24)


def run_here(*flags: object) -> None:
    run_main("train/merge.py", *flags)


def run_command(*flags: object) -> None:
    succeed(sys.executable, "train/merge.py", *flags, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["what is a list? user system assistant\n", "merge.py"]
    return small_tokenizer(64, texts, eos_token="<|endoftext|>", all_bytes=False)


def save_base(path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool) -> None:
    shape = {"hidden": 64, "vocab_size": 64, "tie_word_embeddings": tied}
    save_small(path, tokenizer, **shape, initializer_range=0.1)


def train_adapter(base: Path, path: Path, tokenizer: PreTrainedTokenizerFast, **keys) -> None:
    """One step of AdamW, saved as kd.training.run_training saves it."""
    settings = ModelSettings(dtype="float32", lora_rank=4, **keys)
    torch.manual_seed(1)
    model = load_trained(str(base), settings, tokenizer).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    generation = model.get_base_model().generation_config
    generation.no_repeat_ngram_size = 7  # differs from the base
    generation.save_pretrained(path)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(
    scope="module",
    params=[
        {"quantization": "none", "tied": True, "train_template_tokens": False},
        {"quantization": "nf4", "tied": True, "train_template_tokens": True},
        {"quantization": "nf4", "tied": False, "train_template_tokens": True},
    ],
    ids=["lora", "qlora-tokens-tied", "qlora-tokens-untied"],
)
def merged(request, tokenizer, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(base, adapter, merged model in float32)."""
    root, keys = tmp_path_factory.mktemp("merge"), dict(request.param)
    save_base(root / "base", tokenizer, keys.pop("tied"))
    train_adapter(root / "base", root / "adapter", tokenizer, **keys)
    merge = run_command if keys["quantization"] == "none" else run_here  # one start is enough
    merge("--adapter", root / "adapter", "--output_dir", root / "out", "--dtype", "float32")
    return root / "base", root / "adapter", root / "out"


def test_merged_logits_equal_those_of_the_unquantized_base_and_adapter(merged):
    base, adapter, out = merged
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    assert (expected - before).abs().max() > 0.1  # the adapter does something
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (found - expected).abs().max() < 1e-5


def test_the_folder_is_a_plain_model_with_tokenizer_template_and_done_marker(merged):
    base, adapter, out = merged
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert json.loads((out / "done.json").read_text())["base"] == str(base)


def test_plain_generate_stops_at_the_templates_end_token(merged, tokenizer):
    """The generation config of the base has only EOS; that of the adapter has more."""
    base, _, out = merged
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(base).eos_token_id == eos
    config = GenerationConfig.from_pretrained(out)
    assert config.eos_token_id == sorted([eos, end]) and config.no_repeat_ngram_size == 7
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.manual_seed(0)
    prompt = IDS[:1, :8].repeat(64, 1)
    drawn = model.generate(prompt, do_sample=True, temperature=3.0, max_new_tokens=60)[:, 8:]
    stopped = [row for row in drawn.tolist() if end in row and eos not in row[: row.index(end)]]
    assert len(stopped) > 5
    for row in stopped:
        assert set(row[row.index(end) + 1 :]) <= {eos}  # padding


def test_bfloat16_rounds_the_float32_sum_once_and_a_finished_merge_is_kept(
    merged, tmp_path, capsys
):
    base, adapter, out = merged
    run_here("--adapter", str(adapter), "--output_dir", str(tmp_path))
    exact = AutoModelForCausalLM.from_pretrained(out).state_dict()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(rounded[name], weight.bfloat16())
    run_here("--adapter", str(adapter), "--output_dir", str(tmp_path))
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings.*\n  dtype: found 'float32', wanted 'bf"):
        run_here("--adapter", str(adapter), "--output_dir", str(out))


def test_a_quantized_base_is_rejected(merged, tmp_path):
    base, adapter, _ = merged
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("--adapter", str(adapter), "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"stored quantized \(bitsandbytes\).*--base"):
        run_here(*flags, "--base", str(tmp_path))


def test_a_folder_without_an_adapter_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        run_here("--adapter", str(tmp_path), "--output_dir", str(tmp_path / "out"))


def test_the_adapter_folder_is_rejected_as_output(merged):
    _, adapter, _ = merged
    with pytest.raises(ValueError, match="own folder"):
        run_here("--adapter", str(adapter), "--output_dir", f"{adapter}/../{adapter.name}")


@pytest.fixture(scope="module")
def qlora(tokenizer, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(base, adapter trained on 4-bit weights with its run.json, rows)."""
    root = tmp_path_factory.mktemp("qlora")
    save_base(root / "base", tokenizer, tied=False)
    train_adapter(root / "base", root / "adapter", tokenizer, quantization="nf4")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "what is a list? " * n}) + "\n" for n in (2, 3, 5)))
    recipe = {"quantization": "nf4", "data": json.dumps([{"path": str(rows)}]), "eval_data": None}
    recipe |= {"student": str(root / "base"), "teacher": "some/teacher", "learning_rate": 1e-4}
    recipe |= {"num_train_epochs": 3.0, "max_steps": 50}
    (root / "adapter" / "run.json").write_text(json.dumps({"recipe": recipe}))
    state = {"global_step": 50, "epoch": 0.625, "best_global_step": 20}
    (root / "adapter" / "trainer_state.json").write_text(json.dumps(state))
    return root / "base", root / "adapter", rows


def four_bit_logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the model as trained, (T, V)."""
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4_config(torch.float32), dtype=torch.float32
    )
    disable_cpu_repacking(model)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter)).eval()(input_ids=ids[None]).logits[0]


def test_the_difference_from_the_four_bit_adapter_is_measured_and_printed(
    qlora, tokenizer, tmp_path, capsys
):
    base, adapter, rows = qlora
    run_here("--adapter", str(adapter), "--output_dir", str(tmp_path / "out"), "--dtype", "float32")
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "merge.json").read_text())["four_bit"]
    assert found["text"] in printed and found["rows"] == 3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kl, count = 0.0, 0
    for line in rows.read_text().splitlines():
        ids = torch.tensor(
            [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        )
        p = four_bit_logits(base, adapter, ids)[:-1, : len(tokenizer)].double().log_softmax(-1)
        with torch.no_grad():
            q = (
                merged(input_ids=ids[None])
                .logits[0, :-1, : len(tokenizer)]
                .double()
                .log_softmax(-1)
            )
        kl += float((p.exp() * (p - q)).sum())
        count += len(ids) - 1
    assert found["tokens"] == count
    assert found["forward_kl"] == pytest.approx(kl / count, rel=1e-4)
    assert found["forward_kl"] > 1e-4  # 4-bit weights differ from the base


def test_the_card_has_the_recipe_the_difference_the_results_and_the_licence(qlora, tmp_path):
    base, adapter, rows = qlora
    out, results = tmp_path / "out", tmp_path / "results"
    (results / "perplexity").mkdir(parents=True)
    for name, model in (("mine", out), ("other", base)):
        record = {
            "settings": {"model": str(model)},
            "overall": {"perplexity": 12.345, "bytes": None},
        }
        (results / "perplexity" / f"{name}.json").write_text(json.dumps(record))
    run_here("--adapter", str(adapter), "--output_dir", str(out), "--results", str(results))
    card = (out / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {base}\n")
    assert "| epochs trained | 0.625 |\n| optimizer steps | 50 |" in card
    assert "num_train_epochs" not in card  # three were planned, and max_steps ended them
    assert "| learning_rate | 0.0001 |" in card and "4-bit adapter vs. merged model" in card
    assert f"| perplexity | 12.35 | {results}/perplexity/mine.json |" in card
    assert "other.json" not in card and "bytes" not in card
    terms = card.split("## Licence")[1]
    assert all(f"`{name}`" in terms for name in (base, "some/teacher", rows))


def test_the_card_of_the_best_step_has_the_epochs_until_that_step(qlora):
    _, adapter, _ = qlora
    record, old = adapter / "run.json", (adapter / "run.json").read_text()
    recipe = json.loads(old)["recipe"] | {"load_best_model_at_end": True}
    record.write_text(json.dumps({"recipe": recipe}))
    run = read_run(str(adapter))
    record.write_text(old)
    assert (run["epochs trained"], run["optimizer steps"]) == (0.25, 20)


def test_a_folder_without_the_converter_is_rejected_before_the_merge(qlora, tmp_path):
    _, adapter, _ = qlora
    flags = ("--adapter", str(adapter), "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no convert_hf_to_gguf.py"):
        run_here(*flags, "--llama_cpp", str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    """llama.cpp's converter from the source package of llama-cpp-python."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    flags = ["--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3.36,<0.4"]
    subprocess.run([*pip, *flags], check=True, timeout=600)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        wanted = [m for m in file.getmembers() if "/vendor/llama.cpp/" in m.name]
        parts = ("convert_hf_to_gguf.py", "/conversion/", "/gguf-py/")
        chosen = [m for m in wanted if any(part in m.name for part in parts)]
        file.extractall(folder, chosen, filter="data")
    return next(folder.glob("*/vendor/llama.cpp"))


@pytest.fixture(scope="module")
def llama_adapter(tmp_path_factory) -> Path:
    """A Llama with a byte-fallback tokenizer; the converter accepts only known BPE tokenizers."""
    root = tmp_path_factory.mktemp("llama")
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    pieces.train_from_iterator(["what is a list? what is a map? " * 3], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    train_adapter(root / "base", root / "adapter", tokenizer)
    return root / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_gguf_file_loaded_back_equals_the_merged_model(
    llama_cpp, llama_adapter, tmp_path, kind
):
    flags = ["--adapter", llama_adapter, "--output_dir", tmp_path, "--dtype", "float32"]
    run_here(*map(str, flags), "--llama_cpp", str(llama_cpp), "--gguf_type", kind)
    found = json.loads((tmp_path / "merge.json").read_text())["gguf"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=f"model-{kind}.gguf")
    assert logits(merged).abs().max() > 0.5
    if kind == "f32":
        assert (logits(merged) - logits(back)).abs().max() < 1e-5
    ours, theirs = merged.state_dict(), back.state_dict()
    for name, weight in ours.items():
        if kind == "q8_0" and weight.dim() == 2:  # 32 weights share a float16 step
            blocks, read = weight.view(-1, 32), theirs[name].view(-1, 32)
            step = blocks.abs().amax(-1, keepdim=True) / 127
            assert ((blocks - read).abs() <= 0.57 * step).all()
        else:
            assert torch.equal(weight, theirs[name])
    assert found["forward_kl"] < {"f32": 1e-9, "q8_0": 1e-3}[kind]
    assert f"model-{kind}.gguf loaded back" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_gguf_file_of_other_weights_is_rejected(llama_cpp, llama_adapter, tmp_path):
    flags = ["--adapter", llama_adapter, "--output_dir", tmp_path, "--dtype", "float32"]
    run_here(*map(str, flags), "--llama_cpp", str(llama_cpp), "--gguf_type", "f32")
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="another model"):
        compare_gguf(other, tmp_path / "model-f32.gguf")
