"""Teacher outputs on disk: the k most likely ids of every target token, and the tail mass.

A document is found by a hash of its ids and targets, so the same text gets the same teacher outputs
however rows are shuffled, packed, accumulated or spread over processes. A shard is two NumPy files:
the records, one per target token, read through a memory map, and the index of its documents. The
index is renamed into place last; records without an index do not count.

N target tokens, k ids.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from kd.data.encoding import EncodedRow
from kd.run.atomic import atomic_path, write_text

FORMAT = 1
MANIFEST = "cache.json"
KEY_BYTES = 16
SCALARS = ("log_tail", "label_log_probability", "entropy")  # the last two at temperature 1
LOWEST = -60_000.0  # lowest log-probability that is stored; float16 ends at -65,504
INDEX = np.dtype([("key", f"V{KEY_BYTES}"), ("start", "<i8"), ("count", "<i4")])


def document_key(row: EncodedRow) -> bytes:
    """A hash of the token ids and of which of them are targets."""
    ids = row.input_ids.astype("<i4")
    content = hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES)
    content.update(np.packbits(row.target_mask).tobytes())
    return content.digest()


def record_type(manifest: dict) -> np.dtype:
    """One target token: ids as 16 low and a few high bits, log-probabilities, three scalars."""
    k, number = manifest["top_k"], {"float16": "<f2", "float32": "<f4"}[manifest["dtype"]]
    return np.dtype(
        [
            ("low", "<u2", (k,)),
            ("high", "u1", (-(-k * high_bits(manifest["vocabulary"]) // 8),)),
            ("log_probabilities", number, (k,)),
            ("scalars", number, (len(SCALARS),)),
        ]
    )


def high_bits(vocab_size: int) -> int:
    """Number of bits per id beyond the low 16: 0, 1, 2 (up to 262,144 ids), 4 or 8."""
    more = max(0, (vocab_size - 1).bit_length() - 16)
    return next(bits for bits in (0, 1, 2, 4, 8) if bits >= more)


def pack_ids(ids: np.ndarray, records: np.ndarray, vocab_size: int) -> None:
    """Write ids, (N, k), into the fields `low` and `high` of the records, (N,)."""
    records["low"] = ids & 0xFFFF
    bits = high_bits(vocab_size)
    if bits:
        per_byte = 8 // bits
        high = (ids >> 16).astype(np.uint8)
        high = np.pad(high, ((0, 0), (0, -high.shape[1] % per_byte)))
        high = high.reshape(len(ids), -1, per_byte) << (bits * np.arange(per_byte, dtype=np.uint8))
        records["high"] = np.bitwise_or.reduce(high, -1)


def unpack_ids(records: np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids, (N, k) int32, of the records, (N,)."""
    ids = records["low"].astype(np.int32)
    bits = high_bits(vocab_size)
    if bits:
        shifts = bits * np.arange(8 // bits, dtype=np.uint8)
        high = (records["high"][:, :, None] >> shifts) & (2**bits - 1)
        ids |= high.reshape(len(ids), -1)[:, : ids.shape[1]].astype(np.int32) << 16
    return ids


class CacheWriter:
    """Collects the documents of one process and writes them as shards."""

    def __init__(self, folder: str, manifest: dict, rank: int, shard_bytes: int) -> None:
        self.folder, self.rank, self.shard_bytes = Path(folder), rank, shard_bytes
        self.type = record_type(manifest)
        self.keys: list[bytes] = []
        self.records: list[np.ndarray] = []

    def add(self, key: bytes, records: np.ndarray) -> None:
        """Add the records, (N,), of one document."""
        assert records.dtype == self.type
        self.keys.append(key)
        self.records.append(records)

    def flush_if_full(self) -> None:
        """Write a shard if the collected documents fill one."""
        if sum(map(len, self.records)) * self.type.itemsize >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Write the collected documents as one shard: the records first, the index last."""
        if not self.keys:
            return
        taken = {path.name for path in self.folder.glob(f"{self.rank:03d}-*.records.npy")}
        number = next(
            n for n in range(10**6) if f"{self.rank:03d}-{n:06d}.records.npy" not in taken
        )
        index = np.empty(len(self.keys), INDEX)
        counts = [len(records) for records in self.records]
        index["key"] = np.frombuffer(b"".join(self.keys), f"V{KEY_BYTES}")
        index["count"], index["start"] = counts, np.cumsum([0, *counts[:-1]])
        stem = self.folder / f"{self.rank:03d}-{number:06d}"
        for name, array in (("records", np.concatenate(self.records)), ("index", index)):
            with (
                atomic_path(Path(f"{stem}.{name}.npy"), Path(f"{stem}.{name}.tmp")) as temporary,
                open(temporary, "wb") as file,
            ):
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        self.keys, self.records = [], []


def remove_torn_shards(folder: str) -> int:
    """Remove unfinished files of an interrupted run and return their number."""
    torn = list(Path(folder).glob("*.tmp"))
    for path in Path(folder).glob("*.records.npy"):
        if not path.with_name(path.name.replace("records", "index")).is_file():
            torn.append(path)
    for path in torn:
        path.unlink()
    return len(torn)


def write_manifest(folder: str, manifest: dict) -> None:
    """Write the manifest of a new cache, or check that of an existing one.

    Raises ValueError, naming the difference, if the cache was made with other settings.
    """
    path = Path(folder) / MANIFEST
    if path.is_file():
        # The teacher is identified by its weights; its folder may have moved.
        expected = {key: value for key, value in manifest.items() if key != "teacher_name"}
        check_manifest(folder, json.loads(path.read_text()), expected)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(manifest, indent=2) + "\n")


def check_manifest(folder: str, found: dict, expected: dict) -> None:
    """Raise ValueError, naming the first difference, if a cache was made with other settings."""
    for key, value in expected.items():
        if found.get(key) != value:
            shown = [str(x)[:60] for x in (found.get(key), value)]
            raise ValueError(
                f"teacher_cache: {folder} was made with a different {key}: {shown[0]}, but this "
                f"run has {shown[1]}. Use the recipe of the cache, or another folder"
            )


class TeacherCache:
    """All shards of a folder, read through memory maps.

    Raises ValueError for a missing cache, another format, or a damaged file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"teacher_cache: no file {path}; run train/cache_teacher.py with this recipe first"
            )
        self.manifest: dict = json.loads(path.read_text())
        check_manifest(folder, self.manifest, {"format": FORMAT})
        self.type = record_type(self.manifest)
        self.shards: list[np.ndarray] = []
        self.places: dict[bytes, tuple[int, int, int]] = {}
        for index_file in sorted(self.folder.glob("*.index.npy")):
            records_file = index_file.with_name(index_file.name.replace("index", "records"))
            try:
                index, records = np.load(index_file), np.load(records_file, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"teacher_cache: {records_file}: {error}. Remove it and {index_file.name}, "
                    "and run train/cache_teacher.py again to score the missing documents"
                ) from error
            assert records.dtype == self.type and index["count"].sum() == len(records)
            for key, start, count in index.tolist():
                self.places[key] = (len(self.shards), start, start + count)
            self.shards.append(records)

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    @property
    def tokens(self) -> int:
        """Number of target tokens in all shards."""
        return sum(map(len, self.shards))

    @property
    def bytes(self) -> int:
        """Size of all files of the cache in bytes."""
        return sum(path.stat().st_size for path in self.folder.glob("*.npy"))

    def records(self, documents: Iterable[EncodedRow]) -> np.ndarray:
        """The records, (N,), of the targets of all `documents`, in order."""
        parts = [np.empty(0, self.type)]
        for document in documents:
            if document.targets:
                shard, start, end = self.places[document_key(document)]
                parts.append(self.shards[shard][start:end])
        return np.concatenate(parts)

    def check(
        self, documents: Sequence[EncodedRow], what: str, show: Callable[[list[int]], str]
    ) -> None:
        """Raise ValueError if the cache lacks any of `documents`; `show` decodes ids to text."""
        missing = [
            i
            for i, document in enumerate(documents)
            if document.targets and document_key(document) not in self
        ]
        if missing:
            first = show(documents[missing[0]].input_ids.tolist())[:100]
            raise ValueError(
                f"teacher_cache: {self.folder} lacks {len(missing)} of {len(documents)} {what}; "
                f"the first is number {missing[0] + 1}: {first!r}. Run train/cache_teacher.py with "
                "this recipe to score the missing documents"
            )
