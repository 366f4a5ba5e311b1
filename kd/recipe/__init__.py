"""Recipe files and command-line flags: fields, checks, and one parser that tells all mistakes."""

from kd.recipe.command_line import AUTO, NONE
from kd.recipe.fields import (
    check_ranges,
    parse_json_list,
    parse_json_object,
    require_file,
    require_given,
    require_least,
    setting,
    unknown_key,
)
from kd.recipe.mistakes import all_mistakes, attempt, mistake
from kd.recipe.parse_only import will_exist
from kd.recipe.parser import parse
from kd.recipe.recipe_file import as_flags

__all__ = [
    "AUTO",
    "NONE",
    "all_mistakes",
    "as_flags",
    "attempt",
    "check_ranges",
    "mistake",
    "parse",
    "parse_json_list",
    "parse_json_object",
    "require_file",
    "require_given",
    "require_least",
    "setting",
    "unknown_key",
    "will_exist",
]
