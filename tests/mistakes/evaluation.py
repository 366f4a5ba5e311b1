"""Bad input of the scripts in eval/."""

from mistakes.frame import Case

CASES: list[Case] = []
