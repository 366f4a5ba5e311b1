"""The tensors of a checkpoint's safetensors files, read by ranges of bytes.

A safetensors file is eight bytes with the length of a JSON header, the header, and the tensors. It
is read by offset, not mapped: exactly the wanted bytes move, straight to their place, and are
counted; nothing stays in memory besides.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
CONVERTED = 2**24  # bytes at one time, where the type or the device changes on the way
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # its first byte in the file

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFiles:
    """All tensors of a folder by name; `bytes_read` and `seconds` say what reading has cost."""

    def __init__(self, folder: Path):
        """Reads headers alone. Raises ValueError for files that are missing or cut off."""
        self.folder = folder
        self.bytes_read = 0
        self.seconds = 0.0
        self.used: set[str] = set()  # names that were read, or need not be
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / INDEX
        if not index.is_file():
            file = folder / "model.safetensors"
            if not file.is_file():
                raise ValueError(
                    f"{folder}: no safetensors file; save the checkpoint anew with Transformers"
                )
            self.tensors = read_header(file)
            return
        places = json.loads(index.read_text())["weight_map"]
        missing = sorted({file for file in places.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(f"{folder}: {', '.join(missing)} missing, though {INDEX} names it")
        headers = {file: read_header(folder / file) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in headers[file]:
                raise ValueError(f"{folder / file}: no tensor {name}, though {INDEX} says so")
            self.tensors[name] = headers[file][name]

    @property
    def total_bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())

    def unread(self) -> list[str]:
        return [name for name in self.tensors if name not in self.used]

    def check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        """Raises ValueError naming tensor and file where it is missing or has another shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.folder}: none of its files has the tensor {name}")
        found = self.tensors[name]
        if found.shape != tuple(wanted):
            raise ValueError(f"{found.file}: {name} is {found.shape}; wanted {tuple(wanted)}")

    def read(self, name: str) -> Tensor:
        """A whole tensor in the type of the file, on the CPU."""
        stored = self.tensors[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_range(name, 0, whole.view(-1))
        return whole

    def read_range(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out` (flat) with the numbers of the flattened tensor from `first` on.

        Raises ValueError naming tensor and file where the file cannot give them.
        """
        stored = self.tensors[name]
        began = time.perf_counter()
        try:
            with stored.file.open("rb", buffering=0) as file:
                os.lseek(file.fileno(), stored.start + first * stored.dtype.itemsize, os.SEEK_SET)
                if out.dtype == stored.dtype and out.device.type == "cpu":
                    fill(file, out)
                else:
                    for part in out.split(CONVERTED // stored.dtype.itemsize):
                        buffer = torch.empty(len(part), dtype=stored.dtype)
                        fill(file, buffer)
                        part.copy_(buffer)
        except OSError as error:
            raise ValueError(f"{stored.file}: {name} cannot be read: {error}") from error
        self.seconds += time.perf_counter() - began
        self.used.add(name)
        self.bytes_read += out.numel() * stored.dtype.itemsize


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Raises ValueError where the file is shorter or longer than its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{file}: cut off in its header, at {size} bytes; fetch it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        last = max(header, key=lambda name: header[name]["data_offsets"][1])
        raise ValueError(
            f"{file}: {size} bytes; wanted {end}, up to the end of {last}: fetch it again"
        )
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name} has the type {entry['dtype']}, which is not read here"
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


def fill(file, out: Tensor) -> None:
    """Read until `out`, flat and on the CPU, is full."""
    view = memoryview(out.view(torch.uint8).numpy())
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("it ends too early")
        view = view[count:]
