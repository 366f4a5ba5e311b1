"""Make an AWQ checkpoint of an unquantised one, by rounding to the nearest of sixteen values.

python -m kd.models.awq --model runs/teacher --output_dir runs/teacher-awq

Tensor by tensor: memory is that of one file written and of the largest tensor, whatever the model.
AutoAWQ's search for better scales needs text and a GPU, and loses less; eval/teacher_cost.py
measures how much either loses. Interrupted, the same command goes on after the last whole file.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig

from kd.data.tokenizer import load_tokenizer
from kd.models.awq import pack
from kd.models.quantized import check_readable, empty_model, quantization_settings
from kd.models.sharding import checkpoint_folder
from kd.models.tensor_files import INDEX, TensorFiles, read_header
from kd.recipe import parse, setting
from kd.run.exit import is_done, mark_done

FILE_BYTES = 2**31  # of one file written, about
PARTS = ("qweight", "qzeros", "scales")
SMALLEST = 2.0**-24  # of float16


@dataclass
class WriterSettings:
    model: str = setting("", "hub name or folder of the unquantised model")
    output_dir: str = setting("", "folder of the AWQ checkpoint")
    group_size: int = setting(128, "inputs that share one scale and one zero")

    def __post_init__(self) -> None:
        for key in ("model", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; --help says what it means")
        if self.group_size < 1:
            raise ValueError(f"group_size: {self.group_size}; wanted 1 or more (128, say)")


def main() -> None:
    (settings,) = parse(WriterSettings, description=__doc__)
    write(settings)


def write(settings: WriterSettings) -> None:
    """Raises ValueError for a model that cannot be packed, before anything is written."""
    out = Path(settings.output_dir)
    folder = checkpoint_folder(settings.model)
    config = AutoConfig.from_pretrained(folder)
    if quantization_settings(config):
        raise ValueError(f"model: {settings.model} is quantised already; wanted the one before it")
    check_readable(config, settings.model)
    files = TensorFiles(folder)
    packed, left = choose_linears(config, files, settings.group_size)
    begin(out, folder, settings, left)
    if is_done(settings.output_dir):
        print(f"{out} is finished already; remove it to write anew")
        return
    index = write_files(out, files, packed, settings.group_size)
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    load_tokenizer(settings.model).save_pretrained(out)
    size = index["metadata"]["total_size"]
    mark_done(settings.output_dir, asdict(settings) | {"bytes": size})
    print(
        f"saved to {out}: {len(packed)} layers of 4 bits, {size:,} bytes of {files.total_bytes:,}"
    )


def choose_linears(config, files: TensorFiles, group: int) -> tuple[set[str], list[str]]:
    """(names of the Linears to pack, names of those left): all but the head, where sizes divide.

    Raises ValueError where none can be packed.
    """
    model, _ = empty_model(config, files, torch.float32)
    packed, left = set(), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        divides = module.in_features % group == 0 and module.out_features % 8 == 0
        if divides and module is not model.get_output_embeddings():
            packed.add(name)
        else:
            left.append(name)
    if not packed:
        sizes = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
        raise ValueError(f"group_size: {group} divides none of the model's inputs {sizes}")
    return packed, left


def begin(out: Path, folder: Path, settings: WriterSettings, left: list[str]) -> None:
    """Write config.json first. Raises ValueError where the folder holds other work."""
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = settings.model
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": settings.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": left,
    }
    file = out / "config.json"
    if file.is_file() and json.loads(file.read_text()) != config:
        raise ValueError(f"output_dir: {out} holds another model; take another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2) + "\n")
    if (folder / "generation_config.json").is_file():
        shutil.copy(folder / "generation_config.json", out)


def write_files(out: Path, files: TensorFiles, packed: set[str], group: int) -> dict:
    """The checkpoint's index."""
    weights = {f"{name}.weight" for name in packed}
    parts = plan(files, weights)
    places, total = {}, 0
    with tqdm(total=files.total_bytes, desc="packing", unit="B", unit_scale=True) as shown:
        for number, names in enumerate(parts, 1):
            file = out / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            if not file.is_file():
                tensors = dict(convert(files, names, weights, group, shown))
                save_file(tensors, file.with_suffix(".tmp"), metadata={"format": "pt"})
                file.with_suffix(".tmp").rename(file)
                del tensors
            written = read_header(file)
            places |= dict.fromkeys(written, file.name)
            total += sum(tensor.bytes for tensor in written.values())
    return {"metadata": {"total_size": total}, "weight_map": places}


def plan(files: TensorFiles, weights: set[str]) -> list[list[str]]:
    """Names of the tensors of each file to be written."""
    parts, size = [[]], 0
    for name, tensor in files.tensors.items():
        if size > FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.bytes // (4 if name in weights else 1)
    return parts


def convert(
    files: TensorFiles, names: list[str], weights: set[str], group: int, shown: tqdm
) -> Iterator[tuple[str, Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names:
        tensor = files.read(name)
        if name in weights:
            for part, value in zip(PARTS, quantize(tensor.to(device), group), strict=True):
                yield name.removesuffix("weight") + part, value.cpu()
        else:
            yield name, tensor
        shown.update(files.tensors[name].bytes)


def quantize(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(qweight, qzeros, scales) nearest to `weight` (out, in); 0 stays 0."""
    groups = weight.float().unflatten(1, (-1, group))  # (out, G, group)
    low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)  # (out, G)
    scales = ((high - low) / 15).clamp(min=SMALLEST).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = (groups / scales.float()[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15)
    return pack(numbers.flatten(1).T), pack(zeros.T), scales.T.contiguous()
