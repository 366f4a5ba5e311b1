"""The length-controlled win rate of AlpacaEval 2.0: the win rate predicted at equal lengths.

A logistic regression predicts the preference from the model, the difference in length and, if
known, the difficulty of the instruction; the win rate is the mean prediction without the length
term. Dubois et al. 2024, "Length-Controlled AlpacaEval", section 3. Without difficulties it equals
the "minimal" variant of the alpaca_eval package exactly: the same folds, penalties and solver.
"""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

PENALTIES = np.logspace(-4, 4, 10)  # inverse strengths; cross-validation selects one
FOLDS = 5
SEED = 123  # for liblinear's order of coordinates, as in the package


def length_controlled_win_rate(
    preferences: list[float],
    lengths: list[int],
    baseline_lengths: list[int],
    difficulties: list[float] | None = None,
) -> float:
    """The length-controlled win rate, between 0 and 1.

    `preferences`, FOLDS or more, are probabilities that the model's answer is better; lengths are
    in characters.
    """
    wins = np.array(preferences)
    longer = np.array(baseline_lengths, float) - np.array(lengths, float)
    spread = longer.std(ddof=1)
    columns = [np.tanh(longer / spread if spread else longer)]
    if difficulties is not None:
        columns.append(np.array(difficulties))
    columns.append(np.ones(len(wins)))
    design = np.stack(columns, -1)  # (n, 2) or (n, 3)
    penalty = best_penalty(design, wins)
    fitted = fit(design, wins, penalty, np.random.RandomState(SEED))
    at_equal_length = design.copy()
    at_equal_length[:, 0] = 0.0
    return float(fitted.predict_proba(at_equal_length)[:, 1].mean())


def best_penalty(design: np.ndarray, wins: np.ndarray) -> float:
    """The penalty with the best mean log-likelihood on held-out judgements.

    `design` is (n, 2) or (n, 3), `wins` (n,).
    """
    twice, groups = np.concatenate([design, design]), np.tile(np.arange(len(wins)), 2)
    folds = list(GroupKFold(FOLDS).split(twice, groups=groups))
    scores = np.zeros((FOLDS, len(PENALTIES)))
    for fold, parts in enumerate(folds):
        train, test = (np.unique(groups[part]) for part in parts)
        # One generator for all penalties, as in scikit-learn's own search: liblinear stops so early
        # that the order of coordinates affects the fifth digit, and so the best penalty.
        order = np.random.RandomState(SEED)
        for i, penalty in enumerate(PENALTIES):
            fitted = fit(design[train], wins[train], penalty, order)
            q = np.clip(fitted.predict_proba(design[test])[:, 1], 1e-15, 1 - 1e-15)
            likelihood = wins[test] * np.log(q) + (1 - wins[test]) * np.log(1 - q)
            scores[fold, i] = likelihood.mean()
    return PENALTIES[int(np.argmax(scores.mean(0)))]


def fit(
    design: np.ndarray, wins: np.ndarray, penalty: float, order: np.random.RandomState
) -> LogisticRegression:
    """Fit on every judgement twice, as a win and as a loss, weighted by its probability.

    `design` is (n, 2) or (n, 3), `wins` (n,).
    """
    model = LogisticRegression(
        C=penalty, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=order
    )
    labels = np.repeat([1, 0], len(wins))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the package accepts the same
        return model.fit(np.concatenate([design, design]), labels, np.concatenate([wins, 1 - wins]))
