"""One parser for recipe files and command-line flags, and the checks that settings share.

Precedence: dataclass default < recipe < launch profile < command line. The recipe is converted to
command-line tokens and placed before the others, so that both have the same validation.
"""

import difflib
import json
import sys
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def setting(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field with its `--help` text; `options` are those of `dataclasses.field`."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help}, **options)
    return field(default=default, metadata={"help": help}, **options)


def require_given(settings: object, *keys: str, hint: str = "--help says what it means") -> None:
    """Raise ValueError for the first of `keys` that is empty."""
    for key in keys:
        if not getattr(settings, key):
            raise ValueError(f"{key}: not given; {hint}")


def require_least(settings: object, **least: float) -> None:
    """Raise ValueError for the first key below its least value; None, if optional, is accepted."""
    for key, limit in least.items():
        value = getattr(settings, key)
        if value is not None and not value >= limit:
            raise ValueError(f"{key}: {value}; wanted {limit} or more")


def require_file(key: str, path: str | None) -> None:
    """Raise ValueError if `path` is given and is not a file."""
    if path is not None and not Path(path).is_file():
        raise ValueError(f"{key}: no file {path}; wanted the path of an existing file")


def parse_json_list(key: str, text: str | None) -> list[dict]:
    """Parse a recipe key that holds a list of objects. Raises ValueError for anything else."""
    if not text:
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: not JSON ({error}); wanted a list of objects: {text}") from error
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{key}: found {text}; wanted a list of objects [{{path: ...}}, ...]")
    return value


def parse_json_object(key: str, text: str | None) -> dict:
    """Parse a recipe key that holds an object. Raises ValueError for anything else."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: not JSON ({error}); wanted an object: {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{key}: found {text}; wanted an object {{name: value}}")
    return value


class _UniqueKeys(yaml.SafeLoader):
    """Refuse duplicate keys; PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        duplicates = {key for key in keys if keys.count(key) > 1}
        if duplicates:
            line = node.start_mark.line + 1
            raise ValueError(f"line {line}: key given twice: {sorted(duplicates)}")
        return super().construct_mapping(node, deep)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)


def recipe_tokens(file: str) -> list[str]:
    """Convert a recipe file to command-line tokens.

    Raises ValueError for a missing file, invalid YAML, duplicate keys and empty values.
    """
    require_file("config", file)
    try:
        recipe = yaml.load(Path(file).read_text(), _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{file}: found {type(recipe).__name__}; wanted keys and values")
    for key, value in recipe.items():
        if value is None or value == "" or value == []:
            raise ValueError(f"{file}: {key} is empty; give it a value or remove the line")
    return as_flags(recipe)


def as_flags(recipe: dict[str, Any]) -> list[str]:
    """Convert keys and values to command-line tokens."""
    tokens = []
    for key, value in recipe.items():
        tokens.append(f"--{key}")
        if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
            tokens.append(json.dumps(value))
        elif isinstance(value, list):
            tokens += [str(item) for item in value]
        else:
            tokens.append(str(value).lower() if isinstance(value, bool) else str(value))
    return tokens


def parse(*dataclasses: type, argv: list[str] | None = None, description: str = "") -> tuple:
    """Parse `--config FILE` and flags into one instance of every dataclass; later tokens win.

    Raises ValueError for unknown keys (naming the nearest known one), wrong choices and wrong
    types.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclasses, allow_abbrev=False, description=description)
    parser.add_argument("--config", help="Recipe: a YAML file with the keys below.")
    position = argv.index("--config") if "--config" in argv else None
    if position is not None:
        if position + 1 >= len(argv):
            raise ValueError("--config: no file given")
        tokens = recipe_tokens(argv[position + 1])
        argv = tokens + argv[:position] + argv[position + 2 :]
    known = parser._option_string_actions
    for token in argv:
        name = token.split("=")[0]
        if name.startswith("--") and name not in known:
            raise ValueError(unknown_key(name[2:], [key[2:] for key in known]))
    parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    return parsed[: len(dataclasses)]  # the rest is the namespace of --config


def unknown_key(name: str, known: list[str]) -> str:
    """The error message for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys"
    return f"unknown key {name}{hint}"
