"""Split a command line into keys with their tokens, and read the tokens as values."""

import math
import re
import types
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from kd.recipe.mistakes import mistake

AUTO = "auto"  # the value of a key that is chosen for the present machine
NONE = "none"  # the value of a key that names a file, where there is to be none
YES, NO = ("true", "yes", "1"), ("false", "no", "0")


@dataclass
class CommandLine:
    """The keys of a command line with their tokens."""

    config: str | None = None
    flags: dict[str, list[str]] = field(default_factory=dict)


def split_tokens(tokens: list[str]) -> CommandLine:
    """Split `--key value ...` and `--key=value`; hyphens in keys count as underscores.

    A key that is given twice is a mistake, and so is a value without a key. Raises ValueError
    outside of `all_mistakes`.
    """
    line = CommandLine()
    for key, values in _pairs(tokens):
        if key in line.flags:
            first, again = " ".join(line.flags[key]), " ".join(values)
            mistake(f"{key}: given twice on the command line, {first} and {again}; wanted it once")
        line.flags.setdefault(key, values)
    if "config" in line.flags:
        names = line.flags.pop("config")
        if len(names) != 1:
            mistake(f"config: {' '.join(names) or 'no file given'}; wanted --config FILE")
        else:
            line.config = names[0]
    return line


def _pairs(tokens: list[str]) -> list[tuple[str, list[str]]]:
    """(key, its values) for each flag, in order."""
    pairs: list[tuple[str, list[str]]] = []
    open_for_values = False
    for token in tokens:
        if re.match(r"--[A-Za-z_]", token):  # a number such as -1 is a value
            name, equals, value = token[2:].partition("=")
            pairs.append((name.replace("-", "_"), [value] if equals else []))
            open_for_values = not equals
        elif open_for_values:
            pairs[-1][1].append(token)
        else:
            mistake(f"found {token}, which belongs to no key; wanted --key value")
    return pairs


def read_value(key: str, kind: Any, tokens: list[str]) -> Any:
    """The value of type `kind` that `tokens` stand for.

    Raises ValueError for a wrong number of tokens, a wrong type or a wrong choice.
    """
    kind, auto = without_auto(kind)
    if auto and tokens == [AUTO]:
        return AUTO
    if get_origin(kind) is list:
        if not tokens:
            raise ValueError(f"{key}: no value given; wanted one or more")
        return [read_one(key, get_args(kind)[0], token) for token in tokens]
    if not tokens and kind is bool:
        return True
    if not tokens:
        raise ValueError(f"{key}: no value given; wanted {describe(kind)}")
    if len(tokens) > 1:
        raise ValueError(f"{key}: {len(tokens)} values, {' '.join(tokens)}; wanted one")
    return read_one(key, kind, tokens[0])


def without_auto(kind: Any) -> tuple[Any, bool]:
    """The type of a key's values besides None and `auto`, and whether it may be `auto`."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    parts = [part for part in get_args(kind) if part not in (types.NoneType, Literal[AUTO])]
    return parts[0], Literal[AUTO] in get_args(kind)


def read_one(key: str, kind: Any, text: str) -> Any:
    """The value of the simple type `kind` that `text` stands for.

    Raises ValueError for a wrong type or choice, and for numbers that are not finite.
    """
    wrong = f"{key}: {text!r}; wanted {describe(kind)}"
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(wrong)
        return text
    if kind is bool:
        if text.lower() not in YES + NO:
            raise ValueError(wrong)
        return text.lower() in YES
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            raise ValueError(wrong) from None
        if not math.isfinite(number):
            raise ValueError(f"{key}: {text}; wanted a finite number")
        return number
    return text


def describe(kind: Any) -> str:
    """What a user may write for a type, in words."""
    kind, auto = without_auto(kind)
    if auto:
        return f"{describe(kind)} or {AUTO}".replace(" or false or", ", false or")
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list, each item {describe(get_args(kind)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "text")
