"""Read byte ranges of the tensors in a checkpoint's safetensors files.

A safetensors file is eight bytes with the length of a JSON header, the header, and the tensors.
The files are read by offset and not memory-mapped: exactly the requested bytes move, straight to
their destination, and are counted. Nothing else stays in memory.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kd.model_files import read_json, safetensors_header

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
BUFFER_BYTES = 2**24  # read at once if the type or the device changes on the way
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFiles:
    """All tensors of a folder by name; `bytes_read` and `seconds` count the cost of reading.

    Construction reads only the headers. It raises ValueError for missing or truncated files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_read = 0
        self.seconds = 0.0
        self.used: set[str] = set()  # names that were read or need not be
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / INDEX
        if not index.is_file():
            file = folder / "model.safetensors"
            if not file.is_file():
                raise ValueError(
                    f"{folder}: no safetensors file; save the checkpoint again with Transformers"
                )
            self.tensors = read_header(file)
            return
        places = read_json(index)["weight_map"]
        missing = sorted({file for file in places.values() if not (folder / file).is_file()})
        if missing:
            raise ValueError(
                f"{folder}: {', '.join(missing)} missing, but {INDEX} names it; fetch it again"
            )
        headers = {file: read_header(folder / file) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in headers[file]:
                raise ValueError(
                    f"{folder / file}: no tensor {name}, but {INDEX} names it; fetch both again"
                )
            self.tensors[name] = headers[file][name]

    @property
    def total_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def unread(self) -> list[str]:
        """The names of the tensors that were not used."""
        return [name for name in self.tensors if name not in self.used]

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Raise ValueError naming tensor and file if it is missing or has another shape."""
        if name not in self.tensors:
            raise ValueError(f"{self.folder}: none of its files has the tensor {name}")
        found = self.tensors[name]
        if found.shape != tuple(expected):
            raise ValueError(f"{found.file}: {name} is {found.shape}; wanted {tuple(expected)}")

    def read(self, name: str) -> Tensor:
        """Read a whole tensor in the shape and type of the file, on the CPU.

        Raises ValueError naming tensor and file if the file cannot be read.
        """
        stored = self.tensors[name]
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_range(name, 0, whole.view(-1))
        return whole

    def read_range(self, name: str, first: int, out: Tensor) -> None:
        """Fill `out`, (n,), with the numbers of the flattened tensor from `first` on.

        Raises ValueError naming tensor and file if the file cannot be read.
        """
        stored = self.tensors[name]
        began = time.perf_counter()
        try:
            with stored.file.open("rb", buffering=0) as file:
                os.lseek(file.fileno(), stored.start + first * stored.dtype.itemsize, os.SEEK_SET)
                if out.dtype == stored.dtype and out.device.type == "cpu":
                    fill(file, out)
                else:
                    for part in out.split(BUFFER_BYTES // stored.dtype.itemsize):
                        buffer = torch.empty(len(part), dtype=stored.dtype)
                        fill(file, buffer)
                        part.copy_(buffer)
        except OSError as error:
            raise ValueError(f"{stored.file}: {name} cannot be read: {error}") from error
        self.seconds += time.perf_counter() - began
        self.used.add(name)
        self.bytes_read += out.numel() * stored.dtype.itemsize


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Raises ValueError if the file's size does not match its header, or for an unknown type.
    """
    header, begin = safetensors_header(file)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{file}: {name} has the type {entry['dtype']}; wanted one of {', '.join(DTYPES)}"
            )
        start = begin + entry["data_offsets"][0]
        tensors[name] = StoredTensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return tensors


def fill(file: BinaryIO, out: Tensor) -> None:
    """Read from an unbuffered file until `out`, (n,) on the CPU, is full.

    Raises OSError if the file ends first.
    """
    view = memoryview(out.view(torch.uint8).numpy())
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends too early")
        view = view[count:]
