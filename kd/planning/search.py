"""Search the layout with the shortest step that fits.

The time of a step takes milliseconds to model, its memory seconds to plan. So all layouts are
ranked by their time first, and planned in that order until one fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kd.planning.layout import GIB, SPARE, Layout, Plan

MICRO = "per_device_train_batch_size"
# The keys with a value that is a last resort, in the order of Candidate.last_resorts.
WITHOUT = {"deepspeed": "ZeRO-3", "teacher_sharded_over": "gathers between nodes"}


@dataclass(frozen=True)
class Candidate:
    """Values of the keys that are searched, the layout that they make, and its time."""

    values: dict[str, Any]
    layout: Layout
    seconds: float  # per step, modelled
    last_resorts: tuple[bool, ...] = ()  # uses of what is chosen only if nothing else fits

    @property
    def rank(self) -> tuple:
        """Candidates of lower rank are preferred."""
        return self.last_resorts, self.seconds


@dataclass(frozen=True)
class Found:
    """The candidate that was found, its plan, and all candidates by rank."""

    best: Candidate
    plan: Plan
    ranked: list[Candidate]

    def reason(self, key: str) -> str:
        """Why `key` has its value."""
        size = describe_size(self.plan)
        if self.plan.exceeds:
            return f"nothing fits; this is the smallest, {size}"
        if not self.plan.fits:
            return f"nothing leaves {SPARE:.0%} of the memory free; this is the smallest, {size}"
        place = self.ranked.index(self.best)
        value = self.best.values[key]
        later = [each for each in self.ranked[place:] if each.values[key] != value]
        alike = [each for each in later if each.last_resorts == self.best.last_resorts]
        if key in WITHOUT and any(each.seconds < self.best.seconds for each in later):
            return f"it fits without {WITHOUT[key]}, {size}"
        if place == 0:
            return f"the run fits, {size}"
        others = later if key in WITHOUT else alike
        if not others:
            return f"nothing else leaves memory to spare; {size}"
        ratio = min(each.seconds for each in others) / self.best.seconds
        return f"the fastest that fits, {size}; otherwise a step takes {ratio:.2f} times as long"


def search(candidates: list[Candidate], plan: Callable[[Layout], Plan]) -> Found:
    """Find the candidate of the lowest rank that fits; without one, that of the smallest plan."""
    ranked = sorted(candidates, key=lambda each: each.rank)
    tried: list[tuple[Candidate, Plan]] = []
    for each in ranked:
        tried.append((each, plan(each.layout)))
        if tried[-1][1].fits:
            return Found(*tried[-1], ranked)
    return Found(*min(tried, key=lambda pair: pair[1].total), ranked)


def describe_size(plan: Plan) -> str:
    """The memory of a plan, and its micro-batch."""
    rows = f"{plan.layout.micro} row{'s' if plan.layout.micro > 1 else ''}"
    return f"{plan.total / GIB:.1f} of {plan.layout.memory / GIB:.1f} GiB with {rows}"
