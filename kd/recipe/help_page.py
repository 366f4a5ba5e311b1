"""The text of --help: the keys of a script in groups, each with its default, range and meaning."""

import dataclasses
import textwrap
import typing
from typing import Any

from kd.recipe.command_line import describe

WIDTH = 96


def help_page(kinds: tuple[type, ...], description: str, everything: bool) -> str:
    """The help page; keys of classes marked `RARE` are left out unless `everything` is asked for.

    A group of keys is the class that defines them; its title is the first sentence of the class's
    docstring.
    """
    parts = [
        description.strip(),
        "Recipe:",
        _entry("config", "FILE", "YAML file of the keys below."),
    ]
    hidden = 0
    for title, rare, entries in groups(kinds):
        if rare and not everything:
            hidden += len(entries)
        else:
            parts += [f"{title}:", *entries]
    if hidden:
        parts.append(f"--help-all shows {hidden} more keys, which few runs need.")
    return "\n\n".join(part for part in parts if part)


def groups(kinds: tuple[type, ...]) -> list[tuple[str, bool, list[str]]]:
    """(title, whether it is rarely needed, entries) of each group; the rare groups come last."""
    found: dict[type, list[str]] = {}
    for each in kinds:
        hints = typing.get_type_hints(each)
        for field in dataclasses.fields(each):
            if field.init:
                entry = _describe_field(field, hints[field.name])
                found.setdefault(defining_class(each, field.name), []).append(entry)
    listed = [
        (title_of(owner), vars(owner).get("RARE", False), entries)
        for owner, entries in found.items()
    ]
    return sorted(listed, key=lambda group: group[1])


def defining_class(each: type, name: str) -> type:
    """The first base class, or the class itself, that has annotated the key."""
    return next(c for c in each.__mro__ if name in vars(c).get("__annotations__", {}))


def title_of(owner: type) -> str:
    """The first sentence of a class's docstring, as the title of its keys."""
    text = " ".join((owner.__doc__ or owner.__name__).split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def _describe_field(field: dataclasses.Field, kind: Any) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if callable(field.default_factory) else ""
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    shown = str(shown).lower() if isinstance(shown, bool) else shown
    facts = [str(field.metadata.get("range") or describe(kind))]
    if shown not in (None, ""):
        facts.append(f"default {shown}")
    return _entry(field.name, f"[{'; '.join(facts)}]", field.metadata.get("help", ""))


def _entry(key: str, facts: str, text: str) -> str:
    head = textwrap.wrap(f"--{key}  {facts}", WIDTH, initial_indent="  ", subsequent_indent=" " * 8)
    body = textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(head + body)
