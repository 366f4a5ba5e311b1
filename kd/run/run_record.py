"""The record of a run, run.json: settings, command, commit, package versions and memory plan."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd.run.atomic import write_text

RECORD = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")


def write_record(
    output_dir: str,
    settings: list,
    names: dict[str, str] | None = None,
    plan: dict[str, Any] | None = None,
) -> None:
    """Write run.json: the value of every key, the command, the commit and the versions.

    `names` holds keys that belong to no dataclass of `settings`; `plan` is the memory plan.
    """
    record = {
        "command": sys.argv,
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        "recipe": recipe_of(settings, names),
    } | ({"plan": plan} if plan else {})
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_text(Path(output_dir) / RECORD, json.dumps(record, indent=2, default=str) + "\n")


def earlier_plan(output_dir: str) -> dict[str, Any] | None:
    """The memory plan of an earlier run in this folder, None without one."""
    path = Path(output_dir) / RECORD
    return json.loads(path.read_text()).get("plan") if path.is_file() else None


def recipe_of(settings: list, names: dict[str, str] | None = None) -> dict[str, Any]:
    """Every key of a run with its value."""
    recipe: dict[str, Any] = dict(names or {})
    for part in settings:
        to_dict = getattr(part, "to_dict", lambda part=part: dataclasses.asdict(part))
        recipe.update(to_dict())
    return recipe


def commit() -> str | None:
    """The commit of this checkout, with a trailing + if files have changed since."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
