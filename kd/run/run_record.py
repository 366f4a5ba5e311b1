"""Where a run goes on, and what it leaves: settings, command, commit, versions."""

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd.training.checkpoints.checkpoint import checkpoints

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")


def last_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint as it lies there, unchecked."""
    newest = next(iter(checkpoints(Path(output_dir))), None)
    return None if newest is None else str(newest)


def write_record(
    output_dir: str,
    settings: list,
    names: dict[str, str] | None = None,
    plan: dict[str, Any] | None = None,
) -> None:
    """Leave run.json: every key's value, the command, the commit and the versions.

    `names` are keys that no dataclass of `settings` holds; `plan` is that of the memory.
    """
    record = {
        "command": sys.argv,
        "commit": commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        "recipe": recipe_of(settings, names),
    } | ({"plan": plan} if plan else {})
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, default=str) + "\n"
    (Path(output_dir) / "run.json").write_text(text)


def earlier_plan(output_dir: str) -> dict[str, Any] | None:
    """What an earlier run of this folder planned; older ones have no plan."""
    path = Path(output_dir) / "run.json"
    return json.loads(path.read_text()).get("plan") if path.is_file() else None


def recipe_of(settings: list, names: dict[str, str] | None = None) -> dict[str, Any]:
    """Every key of a run with its value."""
    recipe: dict[str, Any] = dict(names or {})
    for part in settings:
        to_dict = getattr(part, "to_dict", lambda part=part: dataclasses.asdict(part))
        recipe.update(to_dict())
    return recipe


def commit() -> str | None:
    """The commit of this checkout, with a + behind it where files were changed since."""
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
