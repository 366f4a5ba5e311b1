"""Intervals have their stated coverage; tests equal those of other libraries."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from kd.evaluation.report.statistics import bootstrap, holm, interval, ratios, sign_flip_test

TRIALS = 1000


def coverage(draw, truth, value=ratios, draws=500):
    """Share of 95 % intervals that contain the truth; `draw(generator)` returns a model's seeds."""
    generator, held = np.random.default_rng(11), 0
    for trial in range(TRIALS):
        seeds = draw(generator)
        drawn = bootstrap(value, seeds, trial, draws)
        found = interval(np.array([value(s.sum(0)) for s in seeds]), drawn)
        held += found.low <= truth <= found.high
    return held / TRIALS


def test_intervals_of_a_mean_cover_95_percent():
    def accuracy(generator):
        return [np.stack([generator.random(120) < 0.7, np.ones(120)], -1).astype(float)]

    assert 0.93 <= coverage(accuracy, 0.7) <= 0.97


def test_intervals_of_a_perplexity_cover_95_percent():
    """Rows differ in length and longer ones are easier, so the mean is a ratio."""

    def rows(generator):
        tokens = generator.integers(5, 60, 150).astype(float)
        loss = 2.0 + 10.0 / tokens + generator.normal(0, 0.5, 150)
        return [np.stack([tokens * loss, tokens], -1)]

    lengths = np.arange(5, 60)
    truth = np.exp(2.0 + 10.0 / lengths.mean())
    assert 0.93 <= coverage(rows, truth, lambda t: np.exp(ratios(t))) <= 0.97


@pytest.mark.parametrize("between_seeds", [0.02, 0.2])
def test_intervals_over_seeds_and_items_cover_95_percent(between_seeds):
    """Some items are hard for every seed, some seeds are better on every item; with noise."""

    def seeds(generator):
        hard = generator.normal(0, 0.5, 100)
        scores = [
            1.0 + hard + generator.normal(0, between_seeds) + generator.normal(0, 0.2, 100)
            for _ in range(4)
        ]
        return [np.stack([score, np.ones(100)], -1) for score in scores]

    assert 0.93 <= coverage(seeds, 1.0, draws=300) <= 0.97


@pytest.mark.parametrize("between_seeds", [0.0, 0.1])
def test_intervals_of_a_difference_cover_95_percent(between_seeds):
    generator, held = np.random.default_rng(5), 0
    for trial in range(TRIALS):
        hard = generator.normal(0, 1.0, 80)
        scores = [
            hard + mean + generator.normal(0, between_seeds) + generator.normal(0, 0.4, 80)
            for mean in (0.3, 0.3, 0.3, 0.0, 0.0, 0.0)
        ]
        models = [np.stack([score, np.ones(80)], -1) for score in scores]
        drawn = bootstrap(ratios, models, trial, 300)
        found = interval(np.array([s.mean() for s in scores]), drawn, [3, 3])
        held += found.low <= 0.3 <= found.high
    assert 0.93 <= held / TRIALS <= 0.97


def test_the_sign_flip_test_is_exact_for_few_items_and_approximate_for_many():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.4, 1, 11), generator.normal(0, 1, 11)
    d = first - second
    signs = np.array(list(itertools.product((-1, 1), repeat=11)))
    wanted = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert sign_flip_test(first, second, 0) == pytest.approx(wanted)
    library = permutation_test(
        (d,), lambda x, axis: np.abs(x.sum(axis)), permutation_type="samples", alternative="greater"
    )
    assert library.pvalue == pytest.approx(wanted)
    # On binary scores it is McNemar's exact test.
    first = np.array([1.0] * 40 + [0.0] * 22 + [1.0] * 50)
    second = np.array([0.0] * 40 + [1.0] * 22 + [1.0] * 50)
    wanted = binomtest(40, 62).pvalue
    assert sign_flip_test(first, second, 0) == pytest.approx(wanted, abs=0.01)
    assert sign_flip_test(first, first, 0) == 1.0


def test_the_sign_flip_test_rejects_a_true_hypothesis_5_times_in_100():
    generator = np.random.default_rng(3)
    p = [
        sign_flip_test(generator.normal(0, 1, 40), generator.normal(0, 1, 40), i, 499)
        for i in range(1000)
    ]
    assert 0.035 <= np.mean(np.array(p) < 0.05) <= 0.065


def test_holm_corrects_sorted_p_values_by_their_rank():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_sampled_p_value_is_never_zero():
    """The observed signs count as one of the draws. Phipson & Smyth 2010."""
    better, worse = np.ones(200), np.zeros(200)
    assert sign_flip_test(better, worse, 0, 99) == pytest.approx(1 / 100)
