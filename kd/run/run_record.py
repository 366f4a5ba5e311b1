"""The record of a run, run.json: settings, command, commit, package versions and memory plan."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd.credentials import without_credentials
from kd.run.atomic import write_text
from kd.run.finished import read_json

RECORD = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")


def write_record(
    output_dir: str,
    settings: list,
    chosen: dict[str, str] | None = None,
    plan: dict[str, Any] | None = None,
) -> None:
    """Write run.json: the value of every key, the command, the commit and the versions.

    `settings` are dataclasses, or objects with `to_dict`; `chosen` has the reason for each key that
    was `auto`; `plan` is the memory plan.
    """
    record = {
        "command": sys.argv,
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        "recipe": keys_of(settings),
    }
    record |= ({"chosen": chosen} if chosen else {}) | ({"plan": plan} if plan else {})
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    text = without_credentials(json.dumps(record, indent=2, default=str))
    write_text(Path(output_dir) / RECORD, text + "\n")


def earlier_plan(output_dir: str) -> dict[str, Any] | None:
    """The memory plan of an earlier run in this folder, None without one."""
    return read_record(output_dir).get("plan")


def recorded_settings(output_dir: str) -> dict[str, Any]:
    """Every key of an earlier run in this folder with its value; {} without one."""
    return read_record(output_dir).get("recipe", {})


def read_record(output_dir: str | Path) -> dict[str, Any]:
    """The run.json of a folder; {} without one. Raises ValueError if it is damaged."""
    remedy = "restore it, or remove it: then the run is taken for one with the present settings"
    return read_json(Path(output_dir) / RECORD, remedy)


def keys_of(settings: list) -> dict[str, Any]:
    """Every key of a run with its value."""
    keys: dict[str, Any] = {}
    for part in settings:
        keys |= part.to_dict() if hasattr(part, "to_dict") else dataclasses.asdict(part)
    return keys


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
