"""Spreads over seeds, intervals over seeds and items, and tests between two models.

A model on a set of I items is an array (I, 2), a numerator and a denominator each. Its value is
sum / sum: a mean where the denominators are 1, a mean per token where they are numbers of tokens.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student
from scipy.stats import ttest_ind

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean over n seeds and the standard deviation between them; None for one seed."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """mean(first) - mean(second), with its standard error and Welch's two-sided p-value.

    The p-value is None if there is no test; `note` says why.
    """

    value: float
    standard_error: float | None
    p_value: float | None
    note: str


def spread(values: list[float]) -> Spread:
    """Return mean, sample standard deviation and number of the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


def difference(first: list[float], second: list[float]) -> Difference:
    """Compare two models over their seeds without assuming equal variances.

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
    """Whether the ranges mean +/- deviation overlap; None if a deviation is unknown."""
    if a.deviation is None or b.deviation is None:
        return None
    return abs(a.mean - b.mean) <= a.deviation + b.deviation


@dataclass(frozen=True)
class Interval:
    """The ends of a 95 % confidence interval."""

    low: float
    high: float


def ratios(totals: np.ndarray) -> np.ndarray:
    """Divide numerators by denominators: (..., 2) to (...)."""
    return totals[..., 0] / totals[..., 1]


def bootstrap(
    value: Callable[[np.ndarray], np.ndarray],
    models: list[np.ndarray],
    seed: int,
    draws: int = DRAWS,
) -> np.ndarray:
    """Return bootstrap values (draws, models) of models (I, 2). Efron 1979.

    `value` maps sums (k, 2) to values (k,). Items are drawn with replacement, the same ones for all
    models.
    """
    count, generator, found = len(models[0]), np.random.default_rng(seed), []
    step = max(1, min(draws, 4_000_000 // count))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=size)  # (k, n)
        found.append(np.stack([value(weights @ items) for items in models], -1))
    return np.concatenate(found)


def interval(values: np.ndarray, drawn: np.ndarray, groups: list[int] | None = None) -> Interval:
    """Return the interval of the mean over seeds from `values` (S,) and their draws (k, S).

    `groups` are the numbers of seeds of two models, for the difference of their means. With one
    seed each, the interval is the percentiles of the draws. With several seeds, items and seeds are
    both samples. The variance between seeds contains seed effects and noise; the variance of the
    draws contains item effects that all seeds share, and noise. The noise is subtracted once from
    their sum. Student's t with the degrees of freedom of Satterthwaite 1946.
    """
    tail = (1 - LEVEL) / 2
    groups = groups or [len(values)]
    edges = np.cumsum([0, *groups])
    parts = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    signs = (1, -1)
    means = sum(sign * drawn[:, part].mean(1) for sign, part in zip(signs, parts, strict=False))
    if max(groups) == 1:
        low, high = np.quantile(means, [tail, 1 - tail])
        return Interval(float(low), float(high))
    centre = sum(sign * values[part].mean() for sign, part in zip(signs, parts, strict=False))
    shared, between, inverse = means.var(ddof=1), 0.0, 0.0
    for size, part in zip(groups, parts, strict=True):
        if size > 1:
            apart = drawn[:, part] - drawn[:, part].mean(1, keepdims=True)  # (k, seeds)
            shared -= apart.var(0, ddof=1).sum() / (size - 1) / size
            of_seeds = values[part].var(ddof=1) / size
            between, inverse = between + of_seeds, inverse + of_seeds**2 / (size - 1)
    # If all seeds have the same value, only the items vary.
    variance = max(shared, 0.0) + between if between else means.var(ddof=1)
    freedom = variance**2 / inverse if inverse else math.inf
    reach = float(student.ppf(1 - tail, freedom)) * math.sqrt(variance)
    return Interval(float(centre - reach), float(centre + reach))


def sign_flip_test(first: np.ndarray, second: np.ndarray, seed: int, draws: int = 9999) -> float:
    """Return the two-sided p-value of equal means of paired items (I,). Fisher 1935.

    If the models are equally good, every difference is as likely to have the other sign. All 2^n
    signs are enumerated if they are at most `draws`. Equals scipy.stats.permutation_test with
    permutation_type="samples" on |sum|, at a tenth of its time.
    """
    differences = first - second
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    observed = abs(differences.sum()) * (1 - 1e-12)  # equal sums in another order are equal
    if 2 ** len(differences) <= draws:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
        return float(np.mean(np.abs(signs @ differences) >= observed))
    generator, reached, step = np.random.default_rng(seed), 0, 4_000_000 // len(differences) + 1
    for start in range(0, draws, step):
        size = min(step, draws - start)
        signs = 2 * generator.integers(0, 2, (size, len(differences)), dtype=np.int8) - 1
        reached += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + reached) / (1 + draws)


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), which controls the family-wise error rate."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
