"""Find the files of a model (folder, hub or cache), and say in one line what is wrong with them.

Nothing is loaded here, so that a mistake is told before Transformers is imported.
"""

import difflib
import functools
import json
import re
import threading
from pathlib import Path
from typing import Any

from kd.distributed import print_rank0

PROBE_SECONDS = 10  # for the hub's first answer
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
FETCHED: set[str] = set()  # hub names whose files are all in the cache since this process began
POINTER = b"version https://git-lfs"  # the beginning of a file that git-lfs has not fetched


def check_files(name: str | Path, *files: str) -> dict[str, bool]:
    """The options of from_pretrained for a hub name or folder that has one of `files`.

    Raises ValueError if the folder is missing or has none of them, if one is damaged, or if the
    hub is needed and cannot be reached.
    """
    folder, name = Path(name), str(name)
    if not folder.is_dir():
        if is_path(name):
            raise ValueError(f"no folder {name}{similar(folder)}; wanted the folder of a model")
        local = name in FETCHED or only_cached(name, files[0])
        return {"trust_remote_code": False, "local_files_only": local}
    found = [folder / file for file in files if (folder / file).is_file()]
    if not found:
        wanted = " or ".join(files[:2])
        hint = ""
        if CONFIG in files and (folder / ADAPTER_CONFIG).is_file():
            hint = (
                ". It is an adapter: merge it first (python train/merge.py "
                f"--adapter {name} --output_dir {name.rstrip('/')}-merged)"
            )
        raise ValueError(f"{name}: the folder has no {wanted}; wanted a model's folder{hint}")
    for file in found:
        check_fetched(file)
        if file.suffix == ".json":
            read_json(file)
    return {"trust_remote_code": False, "local_files_only": True}


def is_path(name: str) -> bool:
    """Whether a name that is no folder is meant as one, because the hub has no such names."""
    if name.startswith((".", "/", "~")) or Path(name).exists():
        return True
    parts = Path(name).parts
    if len(parts) > 1 and Path(parts[0]).is_dir():
        return True
    return not HUB_NAME.fullmatch(name)


def similar(folder: Path) -> str:
    """Words that name the folder that was probably meant; empty if there is none like it."""
    parent = folder.parent
    if not parent.is_dir():
        return ""
    names = [path.name for path in parent.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f" (there is {parent / near[0]})" if near else ""


@functools.cache
def only_cached(name: str, file: str) -> bool:
    """Whether a hub model must come from the cache, because the hub cannot be reached.

    One short question decides; from_pretrained itself asks again and again for a minute and more.
    Raises ValueError if the model is neither on the hub nor in the cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, file), str)
    problem = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else hub_problem(name)
    if problem is None:
        return False
    if not cached:
        raise ValueError(
            f"{name}: no folder of this name, and not to be had from the hub ({problem}); wanted a "
            "folder or the name of a model on the hub"
        )
    print_rank0(f"note: {name}: the files in the cache are used ({problem})")
    return True


def hub_problem(name: str, kind: str = "model") -> str | None:
    """Why the hub does not give a "model" or a "dataset"; None if it does.

    Waits PROBE_SECONDS at most.
    """
    from huggingface_hub import HfApi

    answers: list[str | None] = [f"no answer within {PROBE_SECONDS} seconds"]

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=PROBE_SECONDS)
            answers.append(None)
        except Exception as error:  # of the HTTP library or the hub's: each is a reason
            answers.append(first_line(error))

    thread = threading.Thread(target=ask, daemon=True)  # a resolver may wait longer than HTTP
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[-1]


def check_weights(name: str | Path) -> set[str]:
    """Return the names of the tensors in a folder's safetensors files; empty for a hub name.

    Raises ValueError naming a file of weights that is missing, not fetched or cut off.
    """
    folder = Path(name)
    if not folder.is_dir():
        return set()  # the hub's client checks the size of what it fetches
    files = {folder / file for file in WEIGHTS if (folder / file).is_file()}
    for index in INDICES:
        if (folder / index).is_file():
            check_fetched(folder / index)
            places = read_json(folder / index).get("weight_map", {})
            files |= {folder / file for file in places.values()}
    if not files:
        raise ValueError(f"{name}: no file named model.safetensors; wanted the weights")
    tensors: set[str] = set()
    for file in sorted(files):
        if not file.is_file():
            raise ValueError(f"{file}: missing, but the index names it; fetch it again")
        check_fetched(file)
        if file.suffix == ".safetensors":
            tensors |= safetensors_header(file)[0].keys()
    return tensors


def check_fetched(file: Path) -> None:
    """Raise ValueError if a file is empty, or only git-lfs's pointer to the file itself."""
    with file.open("rb") as stream:
        begin = stream.read(len(POINTER))
    if begin == POINTER:
        raise ValueError(
            f"{file}: only a pointer to the file, which git-lfs has not fetched; run git lfs pull "
            "in its folder"
        )
    if not begin:
        raise ValueError(f"{file}: empty; fetch it again")


def safetensors_header(file: Path) -> tuple[dict[str, dict], int]:
    """The entries of a safetensors file by tensor, and the offset of the first tensor in the file.

    Raises ValueError if the file's size does not match its header.
    """
    check_fetched(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{file}: cut off in its header, at {size} bytes; fetch it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: its header is damaged ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        last = max(header, key=lambda name: header[name]["data_offsets"][1], default="its header")
        raise ValueError(
            f"{file}: {size} bytes; wanted {end}, up to the end of {last}: fetch it again"
        )
    return header, 8 + length


def read_json(file: Path, remedy: str = "fetch it again") -> Any:
    """The content of a JSON file. Raises ValueError naming the file and the place of the damage."""
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); {remedy}") from error


def first_line(error: BaseException, text: str | None = None) -> str:
    """The type of an error and the first line of its text, or of `text`."""
    lines = [line.strip() for line in (text or str(error)).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
