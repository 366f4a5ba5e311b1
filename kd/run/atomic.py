"""Write files and folders atomically: under a temporary name first, then renamed.

A process that is killed while it writes leaves a temporary file or folder, never half of the real
one.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; rename it to `path` if no error occurs.

    By default the temporary name is `path` + ".tmp". If an error occurs, `path` is untouched and
    the temporary file or folder is removed.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        remove(temporary)
        raise


def write_text(path: Path, text: str, temporary: Path | None = None) -> None:
    """Write a text file atomically."""
    with atomic_path(path, temporary) as file:
        file.write_text(text)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force the content of a file, or the names in a folder, to the disk.

    A rename is durable only once its folder has been synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
