"""What several seeds of one setting say: mean, spread, and Welch's test between two settings."""

import math
import statistics
from dataclasses import dataclass

from scipy.stats import ttest_ind


@dataclass(frozen=True)
class Spread:
    """Mean over n seeds and the standard deviation between them, None for one seed."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """mean(first) - mean(second), with its standard error and Welch's two-sided p-value.

    Both are None where there is no test, and `note` says why.
    """

    value: float
    standard_error: float | None
    p_value: float | None
    note: str


def spread(values: list[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def difference(first: list[float], second: list[float]) -> Difference:
    """Compare two settings over their seeds, without the assumption of equal variances.

    Welch 1947; the standard error is sqrt(s1^2 / n1 + s2^2 / n2).
    """
    a, b = spread(first), spread(second)
    value = a.mean - b.mean
    if a.deviation is None or b.deviation is None:
        return Difference(value, None, None, "one seed: no test")
    error = math.sqrt(a.deviation**2 / a.n + b.deviation**2 / b.n)
    if error == 0.0:
        return Difference(value, error, None, "no spread between seeds: no test")
    p = float(ttest_ind(first, second, equal_var=False).pvalue)
    return Difference(value, error, p, "")


def overlap(a: Spread, b: Spread) -> bool | None:
    """Whether the ranges mean +/- deviation meet; None where a deviation is not known."""
    if a.deviation is None or b.deviation is None:
        return None
    return abs(a.mean - b.mean) <= a.deviation + b.deviation
