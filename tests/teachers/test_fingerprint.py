"""The hash of a teacher: every byte of its weights counts, and is read once."""

import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small import save_small
from transformers import AutoModelForCausalLM

from kd.teachers import file_hashes
from kd.teachers.fingerprint import teacher_fingerprint

OLD = 10**9  # 2001 in seconds


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A teacher in safetensors, the same one in pytorch_model.bin, and an adapter on it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    teacher = save_small(folder / "safetensors")
    pickled = shutil.copytree(teacher, folder / "pickled")
    weights = load_file(pickled / "model.safetensors")
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    shutil.copytree(teacher, folder / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("teacher", "file"),
    [
        ("safetensors", "safetensors/model.safetensors"),
        ("safetensors", "safetensors/config.json"),
        ("pickled", "pickled/pytorch_model.bin"),
        ("adapter", "adapter/adapter_model.safetensors"),
        ("adapter", "base/model.safetensors"),
    ],
)
def test_every_byte_of_a_checkpoint_is_in_its_fingerprint(checkpoints, teacher, file):
    path = checkpoints / file
    before, content = teacher_fingerprint(str(checkpoints / teacher)), path.read_bytes()
    for place in range(0, len(content), len(content) // 20):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert teacher_fingerprint(str(checkpoints / teacher)) != before, place
    path.write_bytes(content)
    assert teacher_fingerprint(str(checkpoints / teacher)) == before


@pytest.mark.parametrize("writable", [True, False])
def test_a_file_is_read_once_until_it_changes(checkpoints, tmp_path, monkeypatch, writable):
    kept = shutil.ignore_patterns(file_hashes.STORE)
    folder = shutil.copytree(checkpoints / "safetensors", tmp_path / "teacher", ignore=kept)
    for file in folder.iterdir():
        os.utime(file, (OLD, OLD))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if not writable:  # for root every folder is writable, but no file can replace a folder
        (folder / file_hashes.STORE).mkdir()
    read, hash_file = [], file_hashes.hash_file
    monkeypatch.setattr(
        file_hashes, "hash_file", lambda path, bar: read.append(path.name) or hash_file(path, bar)
    )
    first = teacher_fingerprint(str(folder))
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert teacher_fingerprint(str(folder)) == first and len(read) == 2
    os.utime(folder / "config.json", (OLD + 1, OLD + 1))
    assert teacher_fingerprint(str(folder)) == first and read[2:] == ["config.json"]
    assert writable == (folder / file_hashes.STORE).is_file()
    assert writable != (tmp_path / "cache").is_dir()


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weights; wanted"):
        teacher_fingerprint(str(tmp_path))
