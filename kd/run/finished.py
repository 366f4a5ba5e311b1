"""What an earlier run left in its folder: whether it has finished, and with which settings."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from kd.distributed import print_rank0
from kd.recipe import AUTO
from kd.run.atomic import write_text

DONE = "done.json"
Changes = dict[str, tuple[Any, Any]]  # key: (found value, wanted value)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file that a run has written; {} without the file.

    Raises ValueError, ending with `remedy`, if the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found {type(content).__name__}, wanted an object; {remedy}")
    return content


def is_done(output_dir: str) -> bool:
    """Whether the run of this folder has finished: a damaged done marker does not count."""
    return bool(done_settings(output_dir))


def done_settings(output_dir: str | Path) -> dict[str, Any]:
    """What the done marker of a folder holds; {} without a readable one."""
    try:
        return read_json(Path(output_dir) / DONE, "")
    except ValueError:
        return {}


def mark_done(output_dir: str, summary: dict) -> None:
    """Write the done marker: the last file of a successful run."""
    write_text(Path(output_dir) / DONE, json.dumps(summary, indent=2) + "\n")


def finished_before(output_dir: str, found: dict, wanted: dict, free: Container[str] = ()) -> bool:
    """Whether the folder holds a finished run of the `wanted` settings; tells so.

    `found` are the settings of the run in the folder; the folder's own name does not count. Raises
    ValueError with one line for each setting that differs, those in `free` excepted.
    """
    if not is_done(output_dir):
        if (Path(output_dir) / DONE).exists():
            print_rank0(f"{output_dir}/{DONE} cannot be read: the run counts as not finished")
        return False
    changes = changed_settings(found, wanted, free)
    if changes:
        raise ValueError(
            f"output_dir: {output_dir} holds a finished run with other settings; give another "
            f"output_dir, or remove the folder to run again:\n{describe_changes(changes)}"
        )
    print_rank0(f"{output_dir} is finished already; remove it to run again")
    return True


def changed_settings(found: dict, wanted: dict, free: Container[str] = ()) -> Changes:
    """The settings in both that differ; those in `free` and what is wanted `auto` do not count."""
    wanted = json.loads(json.dumps(wanted, default=str))
    both = [k for k in found if k in wanted and k not in free and k != "output_dir"]
    changed = [key for key in both if found[key] != wanted[key] and wanted[key] != AUTO]
    return {key: (found[key], wanted[key]) for key in changed}


def describe_changes(changes: Changes) -> str:
    """One line for each changed setting."""
    return "\n".join(f"  {key}: found {a!r}, wanted {b!r}" for key, (a, b) in changes.items())
