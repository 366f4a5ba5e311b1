"""Hashes of a checkpoint's files, each computed once and kept with the file's size and mtime.

They are kept beside the files, or in the user's cache folder where the checkpoint's folder is not
writable.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from kd.run.atomic import write_text

STORE = ".file_hashes.json"
BLOCK_BYTES = 2**22
SETTLED_NS = 10**9  # the hash of a file that was changed less than this ago is not kept
BAR_AFTER_S = 3  # a progress bar appears if hashing takes longer


def file_hashes(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return {name: SHA-256} of files in `folder`.

    Only files whose size or modification time has changed since the last call are read. Raises
    OSError for a file that cannot be read.
    """
    known = read_stores(folder)
    found = {path.name: path for path in sorted(files)}
    states = {name: state_of(path) for name, path in found.items()}
    changed = [name for name, state in states.items() if known.get(name, {}).get("state") != state]
    if not changed:
        return {name: known[name]["sha256"] for name in found}
    total = sum(states[name][0] for name in changed)
    with tqdm(
        desc=f"hashing {folder}",
        total=total,
        unit="B",
        unit_scale=True,
        delay=BAR_AFTER_S,
        leave=False,
    ) as bar:
        for name in changed:
            digest = hash_file(found[name], bar)
            known[name] = {"state": states[name], "sha256": digest}
    # Another change in the same tick of the clock would leave the time as it is.
    settled = time.time_ns() - SETTLED_NS
    kept = {
        name: known[name]
        for name, path in found.items()
        if state_of(path) == states[name] and states[name][1] < settled
    }
    if kept:
        write_store(folder, kept)
    return {name: known[name]["sha256"] for name in found}


def hash_file(path: Path, bar: tqdm) -> str:
    """Return the SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def state_of(path: Path) -> list[int]:
    """Return size in bytes and modification time in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def stores(folder: Path) -> list[Path]:
    """Return the files that may hold the hashes of `folder`, the preferred one first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:20]
    return [folder / STORE, cache / "kd" / "file_hashes" / f"{name}.json"]


def read_stores(folder: Path) -> dict[str, dict]:
    """Return {name: {state, sha256}} of the first readable store; empty if there is none."""
    for store in stores(folder):
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(store.read_text())
            if isinstance(content, dict) and all(isinstance(x, dict) for x in content.values()):
                return content
    return {}


def write_store(folder: Path, content: dict[str, dict]) -> None:
    """Keep the hashes in the first place that is writable; without one they are computed again."""
    for store in stores(folder):
        with contextlib.suppress(OSError):
            store.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1) + "\n"
            write_text(store, text, store.with_name(f"{store.name}.tmp{os.getpid()}"))
            return
