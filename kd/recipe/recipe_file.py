"""Read a recipe, a YAML file of keys and values, as command-line tokens."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from kd.recipe.mistakes import mistake


class _Recipe(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, and without repeated keys.

    PyYAML reads YAML 1.1, in which 1e-4 is a string, 1:30 is 90, 010 is 8 and `no` is false. Of a
    repeated key it keeps the last value in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        duplicates = {key for key in keys if keys.count(key) > 1}
        if duplicates:
            line = node.start_mark.line + 1
            raise ValueError(f"line {line}: key given twice: {sorted(duplicates)}")
        return super().construct_mapping(node, deep)


_Recipe.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9][0-9_]*"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.nan|\.NaN",
    ),
    ("merge", r"<<"),
):
    _Recipe.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None
    )
_Recipe.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
)


def read_recipe(file: str) -> dict[str, list[str]]:
    """The keys of a recipe file, each with its value as command-line tokens.

    A missing file, invalid YAML, repeated keys and empty values are mistakes. Raises ValueError for
    them outside of `all_mistakes`.
    """
    if not Path(file).is_file():
        mistake(f"config: no file {file}; wanted the path of an existing file")
        return {}
    try:
        recipe = yaml.load(Path(file).read_text(encoding="utf-8"), _Recipe)
    except (yaml.YAMLError, ValueError) as error:
        mistake(f"{file}: {' '.join(str(error).split())}")
        return {}
    if not isinstance(recipe, dict):
        mistake(f"{file}: found {type(recipe).__name__}; wanted keys and values")
        return {}
    keys: dict[str, list[str]] = {}
    for name, value in recipe.items():
        key = str(name).replace("-", "_")
        if key == "config":
            mistake(f"{file}: config: {value}; a recipe cannot name another recipe")
        elif key in keys:
            mistake(f"{file}: key given twice: {key} and {name}; wanted it once")
        elif value is None or value == "" or value == [] or value == {}:
            mistake(f"{file}: {key} is empty; give it a value or remove the line", unread=key)
        else:
            keys[key] = as_tokens(value)
    return keys


def as_tokens(value: Any) -> list[str]:
    """A value as command-line tokens: one per item of a list, and JSON for objects."""
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict)):
        return [json.dumps(value, default=str)]
    values = value if isinstance(value, list) else [value]
    return [str(item).lower() if isinstance(item, bool) else str(item) for item in values]


def as_flags(recipe: dict[str, Any]) -> list[str]:
    """Convert keys and values to command-line tokens."""
    return [token for key, value in recipe.items() for token in (f"--{key}", *as_tokens(value))]
