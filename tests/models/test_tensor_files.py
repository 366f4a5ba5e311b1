"""Byte ranges of tensors in safetensors files, and the parameters that they fill."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import save_small

from kd.models import tensor_files
from kd.models.sharding import load_unsharded, shard_range
from kd.models.tensor_files import DTYPES, TensorFiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """A file with a 7 x 9 tensor of random bits for every type, behind another tensor."""
    folder = tmp_path_factory.mktemp("types")
    torch.manual_seed(0)
    tensors = {"first": torch.ones(3, dtype=torch.uint8)}
    for dtype in DTYPES.values():
        bits = torch.randint(0, 256, (7, 9 * dtype.itemsize), dtype=torch.uint8)
        bits = bits % 2 if dtype == torch.bool else bits
        tensors[str(dtype)] = bits.view(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_any_range_of_any_type_is_read_bit_for_bit_and_counted(every_type, dtype):
    files = TensorFiles(every_type)
    whole = load_file(every_type / "model.safetensors")[str(dtype)].flatten()
    for first, count in ((0, 63), (0, 1), (62, 1), (13, 29), (63, 0)):
        before = files.bytes_read
        out = torch.empty(count, dtype=dtype)
        files.read_range(str(dtype), first, out)
        assert torch.equal(out.view(torch.uint8), whole[first : first + count].view(torch.uint8))
        assert files.bytes_read - before == count * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_range_converted_in_several_buffers_equals_the_converted_range(
    tmp_path, monkeypatch, dtype
):
    source = torch.randn(1000)
    save_file({"a": source}, tmp_path / "model.safetensors")
    monkeypatch.setattr(tensor_files, "BUFFER_BYTES", 64)  # bytes: 16 numbers at a time
    files, out = TensorFiles(tmp_path), torch.zeros(403, dtype=dtype)
    files.read_range("a", 501, out)
    assert torch.equal(out, source[501:904].to(dtype))
    assert files.bytes_read == 4 * 403  # bytes in the file, whatever the target type


@pytest.mark.parametrize("numbers", [1, 2, 5, 9, 10, 64, 4099])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16])
def test_the_ranks_read_every_number_once_and_nothing_after_the_tensor(numbers, ranks):
    """The last ranks may hold only padding."""
    size, read = -(-numbers // ranks), []
    for rank in range(ranks):
        first, count = shard_range(numbers, size, rank)
        assert 0 <= count <= size
        read += range(first, first + count)
    assert read == list(range(numbers))


def test_a_file_with_another_size_than_its_header_says_is_rejected(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4)}, file)
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="up to the end of a: fetch it again"):
        TensorFiles(tmp_path)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="cut off in its header, at 20 bytes"):
        TensorFiles(tmp_path)


def test_an_index_that_names_a_tensor_its_file_lacks_is_rejected(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / tensor_files.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="x.safetensors: no tensor b"):
        TensorFiles(tmp_path)


def loaded(folder, dtype="auto"):
    return load_unsharded(str(folder), "sdpa", dtype, CPU)


def test_a_tied_head_is_found_under_either_name_and_never_reported_as_unread(tmp_path, capsys):
    folder, ids = save_small(tmp_path), torch.arange(3, 30)[None]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    expected = loaded(folder)(ids).logits
    table = tensors.pop("model.embed_tokens.weight")
    for names in (["lm_head.weight"], ["lm_head.weight", "model.embed_tokens.weight"]):
        save_file(tensors | {name: table.clone() for name in names}, file)
        model = loaded(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model(ids).logits, expected)
    assert "note" not in capsys.readouterr().out
    extra = {"model.embed_tokens.weight": table, "model.more": torch.ones(1)}
    save_file(tensors | extra | {"model.layers.0.rotary_emb.inv_freq": torch.ones(1)}, file)
    loaded(folder)
    printed = capsys.readouterr().out
    assert (
        "1 tensor was not read" in printed and "model.more" in printed and "inv_freq" not in printed
    )


def test_a_teacher_is_loaded_in_the_requested_type_with_its_generation_config(tmp_path):
    folder = save_small(tmp_path)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [1, 2]}))
    tensors = load_file(folder / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        model = loaded(folder, dtype)
        assert model.generation_config.eos_token_id == [1, 2]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, tensors[name].to(getattr(torch, dtype))), name
