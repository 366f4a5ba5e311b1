"""Find the files of a source's path, or the reason why there are none."""

from collections import Counter
from pathlib import Path

from kd.data.files import COMPRESSED, ENDINGS, file_kind

WANTED = (
    f"wanted {' '.join(ENDINGS)}, a folder or a glob pattern of these, or the name of a hub data "
    "set"
)


def local_files(path: str) -> list[str] | None:
    """Return the files of a path, sorted by name; None if it is the name of a hub data set.

    Hidden files are left out, and so are files of a folder that hold no rows, such as README.md.
    Raises ValueError with the reason if there is no file to read.
    """
    try:
        found = list(map(str, _matches(path)))
    except OSError as error:
        raise ValueError(f"data: {path[:100]}: {error.strerror}") from error
    packed = next((file for file in found if file_kind(file) in COMPRESSED), None)
    if packed:
        raise ValueError(f"data: {packed} is compressed; unpack it first, for example with gunzip")
    files = sorted(file for file in found if file_kind(file) in ENDINGS)
    if not files and is_local(path):
        raise ValueError(f"data: {_reason(path, found)}; {WANTED}")
    return files or None


def _matches(path: str) -> list[Path]:
    """Return the regular files of a path."""
    place = Path(path)
    if place.is_dir():
        inside = [file for file in place.rglob("*") if file.is_file()]
        hidden = [any(p.startswith(".") for p in file.relative_to(place).parts) for file in inside]
        return [file for file, skip in zip(inside, hidden, strict=True) if not skip]
    if place.exists() or not _is_pattern(path):
        return [place] if place.is_file() else []
    base = Path(place.anchor)
    return [file for file in base.glob(str(place.relative_to(base))) if file.is_file()]


def _is_pattern(path: str) -> bool:
    return any(wildcard in path for wildcard in "*?[")


def is_local(path: str) -> bool:
    """Whether a path can only be one of this machine, not the name of a hub data set."""
    here = Path(path).exists() or Path(path).is_symlink()
    file_like = path.startswith(("/", "./", "../", "~")) or file_kind(path) in ENDINGS + COMPRESSED
    return here or file_like or _is_pattern(path)


def _reason(path: str, found: list[str]) -> str:
    """Return why a local path has no file to read; `found` are its files of other kinds."""
    place = Path(path)
    if place.is_dir():
        kinds = dict(Counter(map(file_kind, found)))
        return f"the folder {path} has " + (f"no such file, only {kinds}" if found else "no file")
    if place.is_symlink() and not place.exists():
        return f"{path} is a link to {place.readlink()}, which is missing"
    if found:
        return f"{found[0]} is a file of another kind"
    if place.exists():
        return f"{path} is not a regular file"
    if path.startswith("~"):
        return f"no file {path}: ~ stands for nothing here, write the whole path"
    return f"no file matches {path}" if _is_pattern(path) else f"no file {path}"
