"""One parser for recipe files and command-line flags.

Precedence: dataclass default < recipe < command line. A key that is given twice in the same place
is an error. Nothing here imports torch or Transformers: a mistake is told at once.
"""

import dataclasses
import os
import sys
import typing
from typing import Any

from kd.credentials import refuse_credentials
from kd.recipe.command_line import read_value, split_tokens
from kd.recipe.fields import unknown_key
from kd.recipe.help_page import help_page
from kd.recipe.mistakes import all_mistakes, attempt, mistake
from kd.recipe.recipe_file import as_flags, read_recipe

HELP = {"--help": False, "-h": False, "--help-all": True, "--help_all": True}


def parse(*groups: type, argv: list[str] | None = None, description: str = "") -> tuple:
    """Parse `--config FILE` and flags into one instance of every dataclass.

    Raises ValueError with one line for each mistake: unknown keys (naming the nearest known one),
    keys given twice, wrong choices and types, and what the dataclasses themselves refuse. Inside
    `all_mistakes` they are collected there instead.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for token in argv:
        if token in HELP:
            show(help_page(groups, description, everything=HELP[token]))
            sys.exit(0)
    with all_mistakes():
        return build(groups, read_keys(groups, argv))


def show(page: str) -> None:
    """Print the help page; a reader such as `head` may close the pipe before its end."""
    try:
        print(page, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_keys(groups: tuple[type, ...], argv: list[str]) -> dict[str, Any]:
    """The value of every key that the recipe or the command line gives.

    Raises ValueError as `parse` does, except for what the dataclasses refuse.
    """
    line = split_tokens(argv)
    recipe = read_recipe(line.config) if line.config else {}
    refuse_credentials([*argv, *as_flags(recipe)])
    kinds = types_of(groups)
    unused = {k: why for each in groups for k, why in getattr(each, "UNUSED", {}).items()}
    values: dict[str, Any] = {}
    for place, keys in ((line.config, recipe), (None, line.flags)):
        for key, tokens in keys.items():
            if key in kinds:
                values[key] = _read(place, key, kinds[key], tokens, values.get(key))
            else:
                _refuse(place, key, list(kinds), unused)
    return values


def types_of(groups: tuple[type, ...]) -> dict[str, Any]:
    """The type of every key."""
    kinds: dict[str, Any] = {}
    for each in groups:
        hints = typing.get_type_hints(each)
        kinds |= {field.name: hints[field.name] for field in dataclasses.fields(each) if field.init}
    return kinds


def _read(place: str | None, key: str, kind: Any, tokens: list[str], earlier: Any) -> Any:
    try:
        return read_value(key, kind, tokens)
    except ValueError as error:
        mistake(f"{place}: {error}" if place else str(error), unread=key)
        return earlier


def _refuse(place: str | None, key: str, known: list[str], unused: dict[str, str]) -> None:
    """Refuse an unknown key; the key that was probably meant counts as not read."""
    text = unused.get(key) or unknown_key(key, known)
    meant = text.partition("did you mean ")[2].rstrip("?")
    mistake(f"{place}: {text}" if place else text, unread=meant or None)


def build(groups: tuple[type, ...], values: dict[str, Any]) -> tuple:
    """An instance of each dataclass; after a mistake, one whose check did not come to its end.

    Raises ValueError for what the dataclasses refuse.
    """
    instances = tuple(each.__new__(each) for each in groups)
    for instance in instances:
        own = {field.name for field in dataclasses.fields(instance) if field.init}
        given = {key: value for key, value in values.items() if key in own and value is not None}
        attempt(instance.__init__, **given)
    return instances
