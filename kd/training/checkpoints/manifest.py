"""The manifest of a checkpoint: size and hash of every file, and the identity of its run.

Functions marked "Collective" are called by all ranks: each hashes its share of the files, and all
get the same answer. Without a process group they run on the only rank.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from kd.distributed import all_gather, barrier, broadcast, rank, share_of
from kd.run.atomic import sync_file

MANIFEST = "manifest.json"
PATIENCE_S = 60  # network file systems show another node's new files late


def seal(folder: Path, run_identity: dict[str, Any]) -> None:
    """Collective: hash and sync every file of `folder`, then write its manifest on rank 0.

    Raises ValueError if the ranks do not see the same files.
    """
    files = files_seen_by_all(folder)
    entries: dict[str, dict] = {}
    for share in all_gather({name: entry(folder / name) for name in share_of(files)}):
        entries |= share
    if rank() == 0:
        text = render({"about": run_identity, "files": dict(sorted(entries.items()))})
        (folder / MANIFEST).write_text(text)
        sync_file(folder / MANIFEST)


def damage(folder: Path) -> str | None:
    """Collective: what is wrong with a checkpoint; None if every byte is as it was written."""
    content = broadcast(read_manifest(folder) if rank() == 0 else None)
    if content is None:
        return f"{MANIFEST} is missing, torn or changed"
    found = None
    for name in share_of(list(content["files"])):
        found = found or file_damage(folder / name, content["files"][name])
    return next((text for text in all_gather(found) if text), None)


def file_damage(path: Path, expected: dict) -> str | None:
    """What is wrong with one file; None if its size and hash are as expected."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["size"]:
        return f"{path.name} has {size} bytes instead of {expected['size']}"
    return None if entry(path) == expected else f"{path.name} has changed since it was written"


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a checkpoint; None if it is missing or not byte for byte as written."""
    try:
        text = (folder / MANIFEST).read_text()
        content = json.loads(text)["content"]
        return content if render(content) == text else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def render(content: dict) -> str:
    """The text of a manifest, with a hash of its own content."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content}, indent=1) + "\n"


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint according to its manifest; 0 without one."""
    content = read_manifest(folder)
    return sum(e["size"] for e in content["files"].values()) if content else 0


def entry(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, after forcing it to the disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def files_seen_by_all(folder: Path) -> list[str]:
    """Collective: the files of `folder`, as soon as every rank sees the same ones.

    Raises ValueError if the ranks still disagree after PATIENCE_S seconds.
    """
    barrier()  # every rank has written its files
    start = time.monotonic()
    while True:
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.name != MANIFEST
        )
        views = all_gather((names, time.monotonic() - start > PATIENCE_S))
        differing = [i for i, (seen, _) in enumerate(views) if seen != views[0][0]]
        if not differing:
            return names
        if any(late for _, late in views):
            raise ValueError(
                f"{folder.parent}: rank {differing[0]} sees other files than rank 0; output_dir "
                "must be on a file system that all nodes share"
            )
        time.sleep(1.0)
