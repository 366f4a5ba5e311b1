"""Let a script's own parser read a command line, in this process, and stop the script there."""

import argparse
import functools
import sys

import pytest
from processes import ROOT

from kd.recipe import parser


class ParsedCommandLine(Exception):
    """Carries what a parser has made of a command line."""


@functools.cache
def definitions(script: str) -> dict:
    """The names that a script defines, without running it."""
    names: dict = {"__name__": "parsed", "__file__": str(ROOT / script)}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / script).parent))
        exec(compile((ROOT / script).read_text(), script, "exec"), names)
    return names


def parse_only(script: str, flags: list[str], settings: bool = False):
    """What the script's parser returns: its values by key, or with `settings` its dataclasses.

    Flags and recipe are read as in a real run; the dataclasses are also validated.
    """
    main = definitions(script)["main"]
    build, parse_args = parser.build, argparse.ArgumentParser.parse_args

    def stop(groups, values):
        raise ParsedCommandLine(build(groups, values) if settings else values)

    def stop_another(self, args=None, namespace=None):  # scripts that have a parser of their own
        raise ParsedCommandLine(parse_args(self, args, namespace))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(parser, "build", stop)
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_another)
        with pytest.raises((ParsedCommandLine, SystemExit)) as parsed:
            main()
    if isinstance(parsed.value, SystemExit):  # --help
        assert parsed.value.code == 0
        return {}
    return parsed.value.args[0]
