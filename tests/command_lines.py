"""Let a script's own parser read a command line, in this process, and stop the script there."""

import argparse
import functools
import sys

import pytest
from processes import ROOT
from transformers import HfArgumentParser


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
    """What the script's parser returns: its flags, or with `settings` its dataclasses.

    Flags and recipe are read as in a real run; the dataclasses are also validated.
    """
    main = definitions(script)["main"]
    parse_args = argparse.ArgumentParser.parse_args
    to_settings = HfArgumentParser.parse_args_into_dataclasses

    def stop(self, args=None, namespace=None, **_):
        raise ParsedCommandLine(parse_args(self, args, namespace))

    def stop_with_settings(self, args=None, **options):
        raise ParsedCommandLine(to_settings(self, args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        hook = stop_with_settings if settings else stop
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", hook)
        with pytest.raises(ParsedCommandLine) as parsed:
            main()
    return parsed.value.args[0]
