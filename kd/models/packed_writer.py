"""Write a 4-bit checkpoint by rounding to nearest; train/quantize.py is the command.

kd/models/awq_writer.py and kd/models/nf4_writer.py define the formats.

The weights are processed tensor by tensor. Memory use is one output file and the largest tensor,
whatever the size of the model. An interrupted run continues after the last complete file.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PretrainedConfig

from kd.models.quantized import check_readable, empty_model, quantization_settings
from kd.models.tensor_files import INDEX, TensorFiles, read_header
from kd.pretrained import load_config, model_folder
from kd.run.atomic import atomic_path

FILE_BYTES = 2**31  # approximate size of an output file


@dataclass(frozen=True)
class PackedFormat:
    """A 4-bit format: how a weight is packed, and how config.json describes it."""

    config: dict  # quantization_config without the names of the layers that are left
    skipped_key: str  # its key for these names
    fits: Callable[[nn.Linear], bool]  # whether the layer's sizes can be packed
    unfit: str  # the error if they never can, up to the sizes
    pack: Callable[[Tensor], dict[str, Tensor]]  # weight (out, in) -> tensors by name in the layer


def open_unquantized(model: str) -> tuple[PretrainedConfig, TensorFiles]:
    """The configuration and the tensors of a hub name or folder.

    Raises ValueError if the model is quantized already or cannot be read.
    """
    folder = model_folder(model)
    config = load_config(folder)
    if quantization_settings(config):
        raise ValueError(
            f"model: {model} is quantized already; wanted the unquantized model that it was made "
            "from"
        )
    check_readable(config, model)
    return config, TensorFiles(folder)


def choose_linears(
    config: PretrainedConfig, files: TensorFiles, form: PackedFormat
) -> tuple[set[str], list[str]]:
    """The names of the Linears to pack, and of those left unquantized.

    A Linear is left if it is the head, or if its sizes do not fit the format.
    Raises ValueError if none can be packed.
    """
    model, _ = empty_model(config, files, torch.float32)
    packed, skipped = set(), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if form.fits(module) and module is not model.get_output_embeddings():
            packed.add(name)
        else:
            skipped.append(name)
    if not packed:
        sizes = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"{form.unfit} {sizes}; choose a divisor of one")
    return packed, skipped


def write_config(
    output_dir: str, model: str, source: Path, form: PackedFormat, skipped: list[str]
) -> None:
    """Write config.json, from that in the folder `source`, before any weights.

    Raises ValueError if output_dir holds another model.
    """
    out = Path(output_dir)
    config = json.loads((source / "config.json").read_text())
    config["_name_or_path"] = model
    config["quantization_config"] = form.config | {form.skipped_key: skipped}
    file = out / "config.json"
    if file.is_file() and json.loads(file.read_text()) != config:
        raise ValueError(f"output_dir: {out} holds another model; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2) + "\n")
    if (source / "generation_config.json").is_file():
        shutil.copy(source / "generation_config.json", out)


def write_tensors(output_dir: str, files: TensorFiles, packed: set[str], form: PackedFormat) -> int:
    """Write the safetensors files that are missing, then their index; return the size in bytes."""
    out, weights = Path(output_dir), {f"{name}.weight" for name in packed}
    groups = split_into_files(files, weights)
    places, total = {}, 0
    with tqdm(total=files.total_bytes, desc="packing", unit="B", unit_scale=True) as progress:
        for number, names in enumerate(groups, 1):
            file = out / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            if not file.is_file():
                tensors = dict(convert(files, names, weights, form, progress))
                with atomic_path(file) as temporary:
                    save_file(tensors, temporary, metadata={"format": "pt"})
                del tensors
            written = read_header(file)
            places |= dict.fromkeys(written, file.name)
            total += sum(tensor.bytes for tensor in written.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return total


def split_into_files(files: TensorFiles, weights: set[str]) -> list[list[str]]:
    """The names of the tensors that go into each output file; `weights` will be packed."""
    groups, size = [[]], 0
    for name, tensor in files.tensors.items():
        if size > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.bytes // (4 if name in weights else 1)
    return groups


def convert(
    files: TensorFiles, names: list[str], weights: set[str], form: PackedFormat, progress: tqdm
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors `names` and yield (name, tensor) pairs to write; pack those in `weights`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names:
        tensor = files.read(name)
        if name in weights:
            for part, value in form.pack(tensor.to(device)).items():
                yield name.removesuffix("weight") + part, value.cpu()
        else:
            yield name, tensor
        progress.update(files.tensors[name].bytes)
