"""train/merge.py by its command line, on LoRA and QLoRA adapters trained here for one step."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small import CHATML, small_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from kd.models.load import load_trained
from kd.recipe import ModelSettings

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "merge.py"
IDS = torch.arange(3, 51).view(2, 24)


def run_here(*flags: str) -> None:
    """main() of the script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *flags])
        runpy.run_path(str(SCRIPT))["main"]()


def run_command(*flags: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(SCRIPT), *flags], env=environment, check=True, timeout=120)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["what is a list? user system assistant\n", SCRIPT.name]
    return small_tokenizer(64, texts, eos_token="<|endoftext|>", all_bytes=False)


def save_base(path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def train_adapter(base: Path, path: Path, tokenizer: PreTrainedTokenizerFast, **keys) -> None:
    """One step of AdamW, saved as kd.training.session saves it."""
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
    generation.no_repeat_ngram_size = 7  # to tell the adapter's folder from the base's
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
    merge = run_command if keys["quantization"] == "none" else run_here  # one start is slow enough
    merge(
        "--adapter", str(root / "adapter"), "--output_dir", str(root / "out"), "--dtype", "float32"
    )
    return root / "base", root / "adapter", root / "out"


def test_merged_logits_are_those_of_base_and_adapter_unquantised(merged):
    base, adapter, out = merged
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    assert (expected - before).abs().max() > 0.1  # the adapter does something
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    assert (found - expected).abs().max() < 1e-5


def test_the_folder_is_a_plain_model_with_tokenizer_template_and_marker(merged):
    base, adapter, out = merged
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert not (out / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert json.loads((out / "done.json").read_text())["base"] == str(base)


def test_plain_generate_stops_at_the_templates_end_token(merged, tokenizer):
    """The base's own generation_config knows EOS alone; the adapter's folder knows more."""
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


def test_bfloat16_is_the_float32_sum_rounded_once_and_a_finished_merge_is_kept(
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
    with pytest.raises(ValueError, match="other settings"):
        run_here("--adapter", str(adapter), "--output_dir", str(out))


def test_a_base_that_is_stored_quantised_is_refused(merged, tmp_path):
    base, adapter, _ = merged
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("--adapter", str(adapter), "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"stored quantised \(bitsandbytes\).*--base"):
        run_here(*flags, "--base", str(tmp_path))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        run_here("--adapter", str(tmp_path), "--output_dir", str(tmp_path / "out"))


def test_the_adapters_own_folder_is_never_the_output(merged):
    _, adapter, _ = merged
    with pytest.raises(ValueError, match="own folder"):
        run_here("--adapter", str(adapter), "--output_dir", f"{adapter}/../{adapter.name}")
