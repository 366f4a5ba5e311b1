"""What seeds and items say: spreads, intervals, and tests between two settings."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student
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


# Figures of a model on a set of items: (n, 2), a numerator and a denominator each. Its value is
# sum / sum: a mean where the denominators are 1, a loss a token where they are numbers of tokens.
DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def ratios(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def bootstrap(
    value: Callable[[np.ndarray], np.ndarray],
    models: list[np.ndarray],
    seed: int,
    draws: int = DRAWS,
) -> np.ndarray:
    """(draws, models) of `value`, which takes totals (k, 2) to values (k,).

    The items are drawn with replacement, the same for all models. Efron 1979.
    """
    count, generator, found = len(models[0]), np.random.default_rng(seed), []
    step = max(1, min(draws, 4_000_000 // count))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=size)  # (k, n)
        found.append(np.stack([value(weights @ figures) for figures in models], -1))
    return np.concatenate(found)


def interval(values: np.ndarray, drawn: np.ndarray, groups: list[int] | None = None) -> Interval:
    """For the mean over seeds: `values` (seeds,) and their bootstrap draws over items (k, seeds).

    `groups`: of two settings how many seeds each has, for the difference of their means. One seed
    each: percentiles. Several: items and seeds are both a sample. With item effects that all seeds
    share, seed effects, and noise r of a seed's mean, the variance between seeds holds seed effects
    and noise, that of the draws shared effects and noise; so one noise is taken off. Student's t
    with the degrees of freedom of Satterthwaite 1946.
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
    # Seeds with one value, by chance or because nothing was drawn, leave the items alone.
    variance = max(shared, 0.0) + between if between else means.var(ddof=1)
    freedom = variance**2 / inverse if inverse else math.inf
    reach = float(student.ppf(1 - tail, freedom)) * math.sqrt(variance)
    return Interval(float(centre - reach), float(centre + reach))


def sign_flip_test(first: np.ndarray, second: np.ndarray, seed: int, draws: int = 9999) -> float:
    """Two-sided p-value that two models are equally good on the items, whose figures are paired.

    Were they, each item's difference could as well have the other sign. Fisher 1935. All 2^n signs
    where they are fewer than `draws`.
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
    """Corrected for their number: all true hypotheses survive with probability 95 %. Holm 1979."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected
