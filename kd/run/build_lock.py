"""Where and how DeepSpeed compiles its operators at first use.

torch marks a build with a file, which a killed build leaves behind: every later run would wait for
it without end. Here the kernel locks that file as well, so that an abandoned one can be told and
removed; the builds of an ordinary torch in the same folder are still waited for. A build is also
kept apart from those of other environments and other kinds of CPUs, which would load or rebuild
each other's operators.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import sys
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from kd.run.folder_lock import TAKEN

FOLDER = "TORCH_EXTENSIONS_DIR"
OURS = b"locked\n"  # the content of our files; those of an ordinary torch are empty
ABANDONED = 1800  # seconds after which an ordinary build is taken for dead
PAUSE = 0.1  # seconds between two looks at a file


def use_build_locks() -> None:
    """Choose a folder for compiled operators, unless one is set, and lock builds by the kernel."""
    own = Path(sys.prefix)
    if sys.prefix != sys.base_prefix and os.access(own, os.W_OK):
        os.environ.setdefault(FOLDER, str(own / "torch_extensions" / kind_of_cpu()))
    FileBaton.try_acquire, FileBaton.release = acquire, release


def kind_of_cpu() -> str:
    """A name for CPUs that can run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def acquire(baton: FileBaton) -> bool:
    """Create the file of a build and lock it, as soon as no build goes on; always True.

    The next process finds the operator built, or continues the build of one that was killed.
    """
    path, told = Path(baton.lock_file_path), False
    while True:
        try:
            baton.fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            if remove_abandoned(path):
                continue
            if not told:
                print(f"note: waiting for the build of {path}; if there is none, remove this file")
            told = True
            time.sleep(PAUSE)
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(baton.fd, fcntl.LOCK_EX)  # others hold it only while they look
        os.write(baton.fd, OURS)
        return True


def remove_abandoned(path: Path) -> bool:
    """Remove the file of a build that has ended without doing so; False if it may go on.

    A file with our mark is locked while its build goes on. An ordinary torch, here or on another
    host, locks nothing: only the age of its file tells.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        locks = has_lock(file)
        if locks is False:
            return False
        ours = locks and os.read(file, len(OURS)) == OURS
        if not ours and time.time() - os.fstat(file).st_mtime < ABANDONED:
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                path.unlink()
        return True
    finally:
        os.close(file)


def has_lock(file: int) -> bool | None:
    """Lock a file; False if another process has locked it, None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in TAKEN else None
    return True


def release(baton: FileBaton) -> None:
    """Remove the file of a build, and then the lock: the next process must lock a new file."""
    Path(baton.lock_file_path).unlink(missing_ok=True)
    os.close(baton.fd)
