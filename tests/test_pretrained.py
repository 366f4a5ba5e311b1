"""A model is what its files say: nothing missing becomes random, and a mistake is one line."""

import json
import shutil

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file, save_file
from scripts import quantize
from small import save_reward_model, save_small, small_tokenizer
from transformers import AutoModelForSequenceClassification

from kd import model_files
from kd.data.tokenizer import load_tokenizer
from kd.models.frozen import load_frozen
from kd.models.load import load_trained, nf4_config
from kd.models.quantized import packed_format
from kd.pretrained import load_config, load_model, read_tokenizer
from kd.settings.distillation import ModelSettings

UP = "model.layers.1.mlp.up_proj.weight"
ROUTES = {
    "student": lambda name: trained(name),
    "lora student": lambda name: trained(name, lora_rank=2),
    "4-bit student": lambda name: trained(name, lora_rank=2, quantization="nf4"),
    "frozen": load_frozen,  # teachers, generation, evaluation, inheritance, merging
}


def trained(name: str, **settings):
    settings = ModelSettings(dtype="float32", **settings)
    return load_trained(name, settings, load_tokenizer(name))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A good model, one adapter of it, and damaged copies."""
    work = tmp_path_factory.mktemp("pretrained")
    save_small(work / "good", hidden=64, tie_word_embeddings=False)
    save_small(work / "tied", tie_word_embeddings=True)
    trained(str(work / "good"), lora_rank=2).save_pretrained(work / "adapter")
    shutil.copy(work / "good" / "config.json", work / "adapter" / "base.json")
    changed(work, "missing", lambda tensors: tensors.pop(UP))
    changed(work, "shape", lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    changed(work, "extra", lambda tensors: tensors.update({"model.spare": torch.ones(7)}))
    return work


def changed(work, name, change, source="good", file="model.safetensors"):
    """A copy of a folder whose tensors `change` has edited."""
    folder = shutil.copytree(work / source, work / name)
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("route", ROUTES)
def test_a_tensor_that_is_missing_or_mis_shaped_is_named(work, route):
    with pytest.raises(ValueError, match=f"lack 1 tensor: {UP};"):
        ROUTES[route](str(work / "missing"))
    with pytest.raises(ValueError, match=r"model.norm.weight \(found \(7,\); wanted \(64"):
        ROUTES[route](str(work / "shape"))


def test_a_config_with_more_layers_than_the_files_is_refused(work, tmp_path):
    folder = shutil.copytree(work / "good", tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lack 12 tensors: model.layers.2.input_layernorm.weight"):
        load_frozen(str(folder))


def test_a_tensor_without_a_place_is_told_once_and_a_tied_head_is_not_missing(work, capsys):
    load_frozen(str(work / "extra"))
    printed = capsys.readouterr()
    assert printed.out.count("1 tensor was not read") == 1 and "model.spare" in printed.out
    assert "LOAD REPORT" not in printed.err
    assert "lm_head.weight" not in load_file(work / "tied" / "model.safetensors")
    load_frozen(str(work / "tied"))
    assert "not read" not in capsys.readouterr().out


def test_packed_weights_are_read_as_packed_or_refused(work, tmp_path):
    """quantization_config=None, given to Transformers, would make all linears random."""
    quantize(work / "good", tmp_path / "awq", 32)
    with pytest.raises(ValueError, match="cannot load its model .* AWQ"):
        trained(str(tmp_path / "awq"))
    packed = load_frozen(str(work / "good"), quantization_config=nf4_config(torch.float32))
    packed.save_pretrained(tmp_path / "nf4")
    assert packed_format(str(tmp_path / "nf4")) == "bitsandbytes 4-bit"
    read = load_frozen(str(tmp_path / "nf4"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(read(ids).logits, packed(ids).logits)


def test_a_language_model_is_no_reward_model(work, tmp_path):
    name = str(save_reward_model(tmp_path / "reward", small_tokenizer()))
    load_frozen(name, model_class=AutoModelForSequenceClassification)
    with pytest.raises(ValueError, match="lack 1 tensor: score.weight"):
        load_frozen(str(work / "good"), model_class=AutoModelForSequenceClassification)


def test_tensors_that_an_adapter_lacks_or_has_too_many_are_named(work, recwarn):
    file, down = "adapter_model.safetensors", "layers.0.mlp.down_proj.lora_A.weight"
    key = f"base_model.model.model.{down}"
    load_frozen(str(work / "adapter"))
    folder = changed(work, "less", lambda tensors: tensors.pop(key), "adapter", file)
    with pytest.raises(ValueError, match=f"the adapter lacks 1 tensor: {key}"):
        load_frozen(str(folder))
    more = key.replace("layers.0", "layers.7")
    folder = changed(
        work, "more", lambda tensors: tensors.update({more: torch.ones(2, 128)}), "adapter", file
    )
    with pytest.raises(ValueError, match=f"no place for 1 tensor: {more}"):
        load_frozen(str(folder))
    assert not [warning for warning in recwarn if "adapter keys" in str(warning.message)]


def pointer(text: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


DAMAGES = {
    "cut off": ("model.safetensors", lambda data: data[:-100], "up to the end of"),
    "cut in its header": ("model.safetensors", lambda data: data[:50], "cut off in its header"),
    "a pointer": ("model.safetensors", pointer, "git lfs pull"),
    "empty": ("model.safetensors", lambda data: b"", "empty"),
    "half a config": ("config.json", lambda data: data[:50], "cannot be read as JSON"),
    "half an index": ("model.safetensors.index.json", lambda data: b"{", "cannot be read as JSON"),
    "another type": ("config.json", lambda data: b'{"model_type": "mine"}', "cannot load its"),
    "wrong value": (
        "config.json", lambda data: data.replace(b'"hidden_size": 64', b'"hidden_size": "a"'),
        "Field 'hidden_size' expected int",
    ),
    "own code": (
        "config.json", lambda data: b'{"auto_map": {"AutoConfig": "mine.C"}, "model_type": "mine"}',
        "code of its own (auto_map)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_in_one_line(work, tmp_path, damage):
    file, change, message = DAMAGES[damage]
    folder = shutil.copytree(work / "good", tmp_path / "damaged")
    data = (folder / file).read_bytes() if (folder / file).is_file() else b""
    (folder / file).write_bytes(change(data))
    (folder / "mine.py").write_text("raise SystemExit('the custom code was run')")
    with pytest.raises(ValueError) as raised:
        load_model(folder)
    text = str(raised.value)
    assert message in text and str(folder) in text and len(text.splitlines()) == 1, text
    assert file in text or "cannot load its" in text or "auto_map" in text


def test_a_template_with_a_syntax_error_is_named_with_its_line(work, tmp_path):
    folder = shutil.copytree(work / "good", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }\n")
    with pytest.raises(ValueError, match="model: the chat template has a syntax error in line 2"):
        read_tokenizer(folder)


def test_a_folder_that_does_not_exist_is_told_with_the_one_that_does(work, monkeypatch):
    monkeypatch.setattr(model_files, "hub_problem", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"no folder .*godo .there is {work / 'good'}."):
        load_config(str(work / "godo"))
    for name in ("./godo", "~/godo", "kd/none", "a/b/c", "C:\\models"):
        with pytest.raises(ValueError, match="no folder "):
            read_tokenizer(name)


def test_a_hub_that_cannot_be_reached_is_asked_once_and_the_cache_is_used(monkeypatch, tmp_path):
    from huggingface_hub import HfApi, constants

    asked = []

    def unreachable(self, name, **_):
        asked.append(name)
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="not to be had from the hub .OSError: Name or") as raised:
        load_config("someone/model")
    assert len(str(raised.value).splitlines()) == 1 and asked == ["someone/model"]
    cached = tmp_path / "models--someone--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    save_small(cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    config = load_config("someone/cached")
    assert config.model_type == "qwen2" and asked.count("someone/cached") == 1
    load_config("someone/cached")
    assert asked.count("someone/cached") == 1


def test_only_one_file_calls_from_pretrained():
    """Elsewhere trust_remote_code, missing tensors and damaged files would be forgotten."""
    found = [
        str(file.relative_to(ROOT))
        for folder in ("kd", "train", "eval")
        for file in (ROOT / folder).rglob("*.py")
        if ".from_pretrained(" in file.read_text()
    ]
    assert found == ["kd/pretrained.py"]
