"""One run for each output folder: a lock that its process holds until it ends.

The lock is the kernel's (flock), so a run that is killed leaves none behind. The file says who
holds it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from kd.credentials import without_credentials
from kd.distributed import broadcast, print_rank0, rank

LOCK = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
TAKEN = (errno.EAGAIN, errno.EACCES)  # a network file system may answer with the second

_held: dict[Path, int] = {}  # folder: descriptor of its lock


def lock_folder(key: str, folder: str) -> None:
    """Collective: create the folder that the setting `key` names, and lock it until the exit.

    Only rank 0 takes the lock. Raises ValueError on all ranks if another process has the folder, or
    if the folder cannot be created or written.
    """
    problem, note = take(key, Path(folder).resolve(), folder) if rank() == 0 else ("", "")
    problem = broadcast(problem)
    if problem:
        raise ValueError(problem)
    if note:
        print_rank0(note)


def take(key: str, folder: Path, name: str) -> tuple[str, str]:
    """(why this process cannot have the folder, or "", a note to print, or "")."""
    if folder in _held:
        return "", ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = locked_file(folder / LOCK)
    except BlockingIOError:
        return (
            f"{key}: {name} belongs to another run: {holder(folder / LOCK)}; wait for it or stop "
            "it, or give another folder",
            "",
        )
    except OSError as error:
        if error.errno not in NO_LOCKS:
            return cannot_write(key, name, error), ""
        return "", (
            f"note: the file system of {name} has no locks ({error.strerror}); make sure that no "
            "other run writes to this folder"
        )
    _held[folder] = file
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": without_credentials(" ".join(sys.argv)),
    }
    os.ftruncate(file, 0)
    os.write(file, (json.dumps(owner) + "\n").encode())
    return "", ""


def locked_file(path: Path) -> int:
    """A descriptor of the lock file with the lock on it. Raises BlockingIOError if it is taken."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except OSError as error:
            os.close(file)
            if error.errno in TAKEN:
                raise BlockingIOError(*error.args) from error
            raise
        os.close(file)  # its owner removed the file between our open and our flock


def check_folder(key: str, folder: str) -> None:
    """Create the folder that the setting `key` names. Raises ValueError if that is impossible.

    A folder that exists need not be writable: it may hold all that is needed.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(cannot_write(key, folder, error)) from error


def check_writable(key: str, folder: str | Path) -> None:
    """Create the folder and a file in it on rank 0. Raises ValueError if that is impossible."""
    if rank():
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(cannot_write(key, folder, error)) from error


def cannot_write(key: str, folder: str | Path, error: OSError) -> str:
    """The error message for a folder that cannot be created or written."""
    if isinstance(error, FileExistsError):
        return f"{key}: {folder} is a file; wanted a folder to write to"
    reason = error.strerror or str(error)
    return f"{key}: cannot write to {folder} ({reason}); wanted a folder that can be written"


def holder(path: Path) -> str:
    """Who has the lock, as its file says."""
    try:
        owner = json.loads(path.read_text())
        who = f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
        return f"{who}: {owner['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its lock file does not say which"  # it is being written


def release_locks() -> None:
    """Give back every lock of this process, and remove the folders that are empty."""
    for folder, file in _held.items():
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            folder.rmdir()  # of a run that failed before it wrote anything
        os.close(file)
    _held.clear()


def forget_locks() -> None:
    """Close the locks in a forked child: its life must not prolong them."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=forget_locks)
