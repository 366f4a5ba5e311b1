"""Collect the mistakes of a recipe, so that a user reads all of them at once."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kd.recipe.parse_only import parses_only


class Mistakes:
    """The lines that the user reads, and the keys whose values are of no use."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.unread: set[str] = set()

    def add(self, text: str) -> None:
        """Add a mistake, unless it follows from a value that is of no use itself."""
        for key in self.unread:
            if re.search(rf"\b{key}[:,]|\b(set|give|with|without|without a) {key}\b", text):
                return
        if text not in self.texts:
            self.texts.append(text)

    def __str__(self) -> str:
        if len(self.texts) == 1:
            return self.texts[0]
        return "\n  ".join([f"{len(self.texts)} mistakes", *self.texts])


_collected: Mistakes | None = None


def mistake(text: str, unread: str | None = None) -> None:
    """Collect a mistake; `unread` is a key that has no usable value because of it.

    Raises ValueError at once outside of `all_mistakes`.
    """
    if _collected is None:
        raise ValueError(text)
    _collected.add(text)
    if unread:
        _collected.unread.add(unread)


def attempt(check: Callable, /, *arguments: Any, **options: Any) -> Any:
    """Call `check`; its ValueError is a mistake like the others.

    After a mistake, any other error counts as a consequence of it.
    """
    if _collected is None:
        return check(*arguments, **options)
    try:
        return check(*arguments, **options)
    except ValueError as error:
        _collected.add(str(error))
    except Exception:
        if not _collected.texts:
            raise
    return None


@contextlib.contextmanager
def all_mistakes() -> Iterator[None]:
    """Collect the mistakes of the block; a context inside another one leaves them to the outer.

    Without a mistake the script ends here if it is only to parse its settings.
    Raises ValueError with one line for each mistake.
    """
    global _collected
    if _collected is not None:
        yield
        return
    _collected = found = Mistakes()
    try:
        yield
    except ValueError as error:
        found.add(str(error))
    except Exception:
        if not found.texts:
            raise
    finally:
        _collected = None
    if found.texts:
        raise ValueError(str(found))
    if parses_only():
        sys.exit(0)
