"""The fields of settings: defaults, help texts and ranges; and the checks that settings share."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.recipe.mistakes import mistake


@dataclass(frozen=True)
class Range:
    """The numbers that a key accepts, and in which words a user reads that."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    note: str = ""

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            text = f"{self.least} to {self.most}"
        else:
            low = f"{self.least} or more" if self.least is not None else f"more than {self.above}"
            high = f"at most {self.most}" if self.most is not None else f"less than {self.below}"
            ends = [low] if self.least is not None or self.above is not None else []
            text = " and ".join(ends + ([high] if (self.most, self.below) != (None, None) else []))
        return f"{text} ({self.note})" if self.note else text


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    note: str = "",
    **options: Any,
) -> Any:
    """A dataclass field with its `--help` text and the range of its numbers.

    The range is checked by `check_ranges`; `note` explains it. `options` are those of
    `dataclasses.field`.
    """
    metadata: dict[str, Any] = {"help": help}
    if any(limit is not None for limit in (least, above, most, below)):
        metadata["range"] = Range(least, above, most, below, note)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, **options)
    return dataclasses.field(default=default, metadata=metadata, **options)


def check_ranges(settings: Any) -> None:
    """Note every number of `settings` that is not finite, or outside the range of its key.

    Raises ValueError for them outside of `all_mistakes`.
    """
    for field in dataclasses.fields(settings):
        value, wanted = getattr(settings, field.name), field.metadata.get("range")
        values = value if isinstance(value, list) else [value]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if any(not math.isfinite(v) or (wanted is not None and v not in wanted) for v in numbers):
            wanted = wanted or "a finite number"
            mistake(f"{field.name}: {value}; wanted {wanted}", unread=field.name)


def require_given(settings: object, *keys: str, hint: str = "--help says what it means") -> None:
    """Note each of `keys` that is empty. Raises ValueError outside of `all_mistakes`."""
    for key in keys:
        if not getattr(settings, key):
            mistake(f"{key}: not given; {hint}")


def require_least(settings: object, **least: float) -> None:
    """Note each key below its least value; None, if optional, is accepted.

    Raises ValueError outside of `all_mistakes`.
    """
    for key, limit in least.items():
        value = getattr(settings, key)
        if value is not None and not value >= limit:
            mistake(f"{key}: {value}; wanted {limit} or more")


def require_file(key: str, path: str | None) -> None:
    """Note `path` if it is given and not a file. Raises ValueError outside of `all_mistakes`."""
    if path is not None and not Path(path).is_file():
        mistake(f"{key}: no file {path}; wanted the path of an existing file")


def parse_json_list(key: str, text: str | None) -> list[dict]:
    """Parse a recipe key that holds a list of objects; anything else is a mistake.

    Raises ValueError outside of `all_mistakes`.
    """
    wanted = 'a list of objects such as [{"path": "rows.jsonl"}]'
    value = parse_json(key, text or "[]", wanted, is_list_of_objects)
    return [value] if isinstance(value, dict) else value or []


def parse_json_object(key: str, text: str | None) -> dict:
    """Parse a recipe key that holds an object; anything else is a mistake.

    Raises ValueError outside of `all_mistakes`.
    """
    wanted = 'an object such as {"name": "value"}'
    return parse_json(key, text or "{}", wanted, lambda value: isinstance(value, dict)) or {}


def is_list_of_objects(value: Any) -> bool:
    """Whether a value is a list of objects, or one object, which stands for a list of it."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, dict) for item in items)


def parse_json(key: str, text: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
    """Parse JSON; what is not JSON or does not fit is a mistake, and the result is None.

    Raises ValueError outside of `all_mistakes`.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        mistake(f"{key}: found {text}, which is not JSON ({error}); wanted {wanted}", unread=key)
        return None
    if fits(value):
        return value
    mistake(f"{key}: found {text}; wanted {wanted}", unread=key)
    return None


def unknown_key(name: str, known: list[str]) -> str:
    """The error message for an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys"
    return f"unknown key {name}{hint}"
