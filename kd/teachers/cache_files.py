"""Teacher outputs on disk: the k most likely ids of every target token, and the tail mass.

A document is found by a hash of its ids and targets, so the same text gets the same teacher outputs
however rows are shuffled, packed, accumulated or spread over processes. A shard is two NumPy files:
the records, one per target token, read through a memory map, and the index of its documents. The
index is renamed into place last; records without an index do not count. The index has a checksum of
every document's records, which is compared whenever they are read.

N target tokens, k ids.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from kd.data.encoding import EncodedRow
from kd.run.atomic import atomic_path, write_text

FORMAT = 2  # 2: checksums of records and manifest; the teacher's hash covers all of its files
MANIFEST = "cache.json"
KEY_BYTES = 16
SCALARS = ("log_tail", "label_log_probability", "entropy")  # the last two at temperature 1
LOWEST = -60_000.0  # lowest log-probability that is stored; float16 ends at -65,504
INDEX = np.dtype(
    [("key", f"V{KEY_BYTES}"), ("start", "<i8"), ("count", "<i4"), ("checksum", "<u4")]
)
NUMBERS = {"float16": "<f2", "float32": "<f4"}


class DamagedCache(ValueError):
    """A file of a cache is not as it was written.

    A DataLoader worker's error reaches the main process as a page whose last line is the message.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text[text.rindex("teacher_cache: ") :].strip())


def document_key(row: EncodedRow) -> bytes:
    """A hash of the token ids and of which of them are targets."""
    ids = row.input_ids.astype("<i4")
    content = hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES)
    content.update(np.packbits(row.target_mask).tobytes())
    return content.digest()


def record_type(manifest: dict) -> np.dtype:
    """One target token: ids as 16 low and a few high bits, log-probabilities, three scalars."""
    k, number = manifest["top_k"], NUMBERS[manifest["dtype"]]
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


def checksum(key: bytes, records: np.ndarray) -> int:
    """CRC-32 of a document's key and its records, (N,)."""
    return zlib.crc32(np.ascontiguousarray(records).view(np.uint8), zlib.crc32(key))


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
        index["checksum"] = list(map(checksum, self.keys, self.records))
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

    Raises ValueError, naming the difference, if the cache was made with other settings; ValueError
    for a manifest that is damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    if path.is_file():
        # The teacher is identified by its weights; its folder may have moved.
        expected = {key: value for key, value in manifest.items() if key != "teacher_name"}
        check_manifest(folder, read_manifest(folder), expected)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(manifest | {"sha256": digest(manifest)}, indent=2) + "\n")


def read_manifest(folder: str) -> dict:
    """Read the manifest of a cache.

    Raises ValueError if there is none, or if it is damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"teacher_cache: no file {path}; run train/cache_teacher.py with this recipe first"
        )
    again = f"remove {folder} and run train/cache_teacher.py with this recipe again"
    try:
        manifest = json.loads(path.read_bytes())
        found = manifest["format"]
        same = found != FORMAT or manifest.pop("sha256") == digest(manifest)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DamagedCache(f"teacher_cache: {path} has changed since it was written; {again}")
    if found != FORMAT:
        raise ValueError(
            f"teacher_cache: {folder} has the format {found}, this version reads {FORMAT}; {again}"
        )
    return manifest


def digest(manifest: dict) -> str:
    """A hash of all entries of a manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_manifest(folder: str, found: dict, expected: dict) -> None:
    """Raise ValueError, naming the first difference, if a cache was made with other settings."""
    for key, value in expected.items():
        if found.get(key) != value:
            shown = [str(x)[:60] for x in (found.get(key), value)]
            raise ValueError(
                f"teacher_cache: {folder} was made with a different {key}: {shown[0]}, but this "
                f"run has {shown[1]}. Use the recipe of the cache, or another folder"
            )


def read_shard(
    index_file: Path, records_file: Path, kind: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The index, in memory, and the records, (N,) memory-mapped, of a shard.

    Raises ValueError if they are damaged or do not fit each other.
    """
    try:
        index, records = np.load(index_file), np.load(records_file, mmap_mode="r")
    except Exception as error:  # a damaged header is evaluated as Python, which may raise anything
        raise damaged(records_file, str(error)) from error
    if index.dtype != INDEX or records.dtype != kind or index.ndim != 1:
        raise damaged(records_file, "other fields than cache.json says")
    starts = np.cumsum([0, *index["count"]])
    if records.shape != starts[-1:] or (index["start"] != starts[:-1]).any():
        raise damaged(records_file, "its index does not fit it")
    return index, records


def damaged(file: Path, reason: str) -> DamagedCache:
    """The error of a damaged shard; `file` are its records."""
    index = file.name.replace("records", "index")
    return DamagedCache(
        f"teacher_cache: {file} is damaged ({reason.splitlines()[0] if reason else 'unreadable'}). "
        f"Remove it and {index}, and run train/cache_teacher.py again to score the missing "
        "documents"
    )


class TeacherCache:
    """All shards of a folder, read through memory maps.

    Raises ValueError for a missing cache, another format, or a damaged file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.type = record_type(self.manifest)
        self.shards: list[np.ndarray] = []
        self.files: list[Path] = []  # of the shards
        self.places: dict[bytes, tuple[int, int, int, int]] = {}  # shard, start, end, checksum
        for index_file in sorted(self.folder.glob("*.index.npy")):
            records_file = index_file.with_name(index_file.name.replace("index", "records"))
            self.files.append(records_file)
            index, records = read_shard(index_file, records_file, self.type)
            for key, start, count, crc in index.tolist():
                self.places[key] = (len(self.shards), start, start + count, crc)
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
        """The records, (N,), of the targets of all `documents`, in order.

        Raises ValueError, naming the file, if they have changed since they were written.
        """
        parts = [np.empty(0, self.type)]
        for document in documents:
            if document.targets:
                key = document_key(document)
                shard, start, end, expected = self.places[key]
                parts.append(np.array(self.shards[shard][start:end]))
                if len(parts[-1]) != document.targets or checksum(key, parts[-1]) != expected:
                    raise damaged(self.files[shard], "the checksum of a document differs")
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
