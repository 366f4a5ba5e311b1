"""What a whole checkpoint is: a manifest with the size and hash of every file in it.

Every function that says so is collective: all ranks call it, hash their share of the files, and get
the same answer. Without a process group it is one rank's.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from kd.distributed import all_gather, barrier, broadcast, rank, share_of

MANIFEST = "manifest.json"
PATIENCE_S = 60  # network file systems show another node's new files late


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Collective: hash and sync every file of `folder`, then write its manifest on the first rank.

    Raises ValueError where the ranks do not see the same files.
    """
    files = files_seen_by_all(folder)
    entries: dict[str, dict] = {}
    for share in all_gather({name: entry(folder / name) for name in share_of(files)}):
        entries |= share
    if rank() == 0:
        text = render({"about": about, "files": dict(sorted(entries.items()))})
        with open(folder / MANIFEST, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """Collective: what is wrong with a checkpoint, None where every byte is as it was written."""
    content = broadcast(read_manifest(folder) if rank() == 0 else None)
    if content is None:
        return f"{MANIFEST} is missing, torn or changed"
    found = None
    for name in share_of(list(content["files"])):
        found = found or file_damage(folder / name, content["files"][name])
    return next((text for text in all_gather(found) if text), None)


def file_damage(path: Path, wanted: dict) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != wanted["size"]:
        return f"{path.name} has {size} bytes instead of {wanted['size']}"
    return None if entry(path) == wanted else f"{path.name} has other bytes than were written"


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a checkpoint; None where there is none, or not byte for byte ours."""
    try:
        text = (folder / MANIFEST).read_text()
        content = json.loads(text)["content"]
        return content if render(content) == text else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def render(content: dict) -> str:
    """The text of a manifest; its hash covers itself."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content}, indent=1) + "\n"


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint by its manifest; 0 without one."""
    content = read_manifest(folder)
    return sum(e["size"] for e in content["files"].values()) if content else 0


def entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is on its disk afterwards."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def files_seen_by_all(folder: Path) -> list[str]:
    """Collective: the files of `folder`, once every rank sees the same."""
    barrier()  # all of them have been written
    start = time.monotonic()
    while True:
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.name != MANIFEST
        )
        views = all_gather((names, time.monotonic() - start > PATIENCE_S))
        other = [i for i, (seen, _) in enumerate(views) if seen != views[0][0]]
        if not other:
            return names
        if any(late for _, late in views):
            raise ValueError(
                f"{folder.parent}: rank {other[0]} sees other files than rank 0; output_dir must "
                "be on a file system that all nodes share"
            )
        time.sleep(1.0)
