"""Bad surroundings of a run: output folders, earlier runs, disks, environments."""

from mistakes.frame import Case

CASES: list[Case] = []
