"""Frequency against accuracy over classes: correlations with intervals, a permutation null, bins, and a regression.

Paper, section 3.3. A class is one observation; all intervals are over classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000  # of every bootstrap and of every permutation null
# The paper's bins of counts, and further ones above 100,000; the last is open.
BINS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)

Statistic = Callable[..., np.ndarray | float]  # of counts and accuracies, and for partial ones of another variable


class Correlation(NamedTuple):
    """A coefficient with its 95% bootstrap interval over classes, and what shuffled classes give."""

    value: float
    low: float
    high: float
    null_low: float  # the middle 95% of the coefficients of shuffled classes
    null_high: float
    p: float  # share of shuffled classes with a coefficient as far from 0
    n: int  # classes


class Bin(NamedTuple):
    """The classes whose count is at least `low` and below `high`."""

    low: float
    high: float  # infinity for the last
    classes: int
    accuracy: float  # mean over the classes; NaN without classes


class Slope(NamedTuple):
    """Change of the log-odds of a right answer per unit of a predictor, with its 95% interval."""

    predictor: str
    value: float
    low: float
    high: float
    dispersion: float  # of the quasi-binomial regression: 1 for independent answers within a class


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's coefficient over the last axis; NaN where one side does not vary."""
    varies = (np.ptp(x, axis=-1) > 0) & (np.ptp(y, axis=-1) > 0)
    x, y = x - x.mean(axis=-1, keepdims=True), y - y.mean(axis=-1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=-1)) * np.sqrt((y * y).sum(axis=-1))
    return np.where(varies, (x * y).sum(axis=-1) / np.where(varies, scale, 1), np.nan)[()]


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's coefficient over the last axis, equal values sharing their mean rank; NaN where one does not vary."""
    from scipy.stats import rankdata

    return pearson(rankdata(x, axis=-1), rankdata(y, axis=-1))


def pearson_log(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's coefficient of log10(1 + count): a few frequent classes do not decide it alone."""
    return pearson(np.log10(1 + x), y)


STATISTICS: dict[str, Statistic] = {"spearman": spearman, "pearson": pearson, "pearson_log": pearson_log}


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Spearman's coefficient of x and y given another variable, over the last axis; NaN where that explains one."""
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    rest = (1 - xz**2) * (1 - yz**2)
    return np.where(rest > 1e-9, (xy - xz * yz) / np.sqrt(np.maximum(rest, 1e-9)), np.nan)[()]


def correlate(x: np.ndarray, y: np.ndarray, statistic: Statistic, given: np.ndarray | None = None) -> Correlation:
    """A coefficient of counts x and accuracies y [classes], its bootstrap interval, and its permutation null.

    `given` [classes]: the other variable of a partial coefficient, which stays with the counts where classes are
    shuffled. Raises ValueError below three classes, where no coefficient says anything.
    """
    if len(x) < 3:
        raise ValueError("three classes are needed for a correlation")
    rng = np.random.default_rng(0)
    rows = rng.integers(len(x), size=(RESAMPLES, len(x)))  # [draws, classes]
    shuffled = rng.permuted(np.tile(y, (RESAMPLES, 1)), axis=1)  # [draws, classes]
    others = () if given is None else (given,)
    value = float(statistic(x, y, *others))
    draws = _of_draws(statistic, x[rows], y[rows], *(other[rows] for other in others))
    null = _of_draws(statistic, *np.broadcast_arrays(x, shuffled), *(np.tile(z, (RESAMPLES, 1)) for z in others))
    low, high = _middle(draws)
    null_low, null_high = _middle(null)
    p = float((1 + (np.abs(null) >= abs(value) - 1e-12).sum()) / (1 + RESAMPLES)) if value == value else float("nan")
    return Correlation(value, low, high, null_low, null_high, p, len(x))


def _of_draws(statistic: Statistic, *values: np.ndarray) -> np.ndarray:
    """A statistic of every draw [draws]; those over bins know one draw at a time."""
    if statistic in (*STATISTICS.values(), partial_spearman):
        return statistic(*values)
    return np.array([statistic(*draw) for draw in zip(*values, strict=True)])


def _middle(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95% of the draws that are numbers; NaN where fewer than half are."""
    found = draws[~np.isnan(draws)]
    if 2 * len(found) < len(draws):
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def bins(x: np.ndarray, y: np.ndarray, edges: Sequence[float] = BINS) -> list[Bin]:
    """Mean accuracy and number of classes by count: [0, 10), [10, 20), ... (Figure 3), the last bin open."""
    found = []
    for low, high in zip(edges, [*edges[1:], np.inf], strict=True):
        rows = (x >= low) & (x < high)
        found.append(Bin(low, high, int(rows.sum()), float(y[rows].mean()) if rows.any() else float("nan")))
    return found


def equal_bins(x: np.ndarray, y: np.ndarray, count: int) -> list[Bin]:
    """The same for bins of equally many classes, in the order of their counts; ties in the order of the classes."""
    parts = np.array_split(np.argsort(x, kind="stable"), count)
    return [
        Bin(float(x[rows].min()), float(x[rows].max()), len(rows), float(y[rows].mean())) for rows in parts if len(rows)
    ]


def binned_spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's coefficient over the paper's bins: of their order and their mean accuracy, empty bins left out."""
    which = np.searchsorted(BINS, x, side="right")  # [classes]
    counts = np.bincount(which)
    means = (np.bincount(which, weights=y) / np.maximum(counts, 1))[counts > 0]  # as of `bins`
    return spearman(np.arange(len(means)), means) if len(means) > 1 else float("nan")


def equal_binned_spearman(x: np.ndarray, y: np.ndarray, count: int = 10) -> float:
    """The same over bins of equally many classes."""
    means = np.array([part.mean() for part in np.array_split(y[np.argsort(x, kind="stable")], count) if len(part)])
    return spearman(np.arange(len(means)), means)


def logistic_slopes(right: np.ndarray, n: np.ndarray, predictors: dict[str, np.ndarray]) -> list[Slope]:
    """Quasi-binomial regression of right answers among n [classes] on several predictors [classes] at once.

    The dispersion of answers within classes is estimated (Pearson's chi-square), so that the intervals are not those of
    independent answers; they use Student's t. Raises ValueError where there are not more classes than parameters, and
    where predictors depend on each other.
    """
    import warnings

    import statsmodels.api as sm
    from scipy.stats import t
    from statsmodels.tools.sm_exceptions import PerfectSeparationWarning

    freedom = len(right) - len(predictors) - 1
    if freedom < 1:
        raise ValueError("more classes than parameters are needed for a regression")
    design = np.column_stack([np.ones(len(right)), *predictors.values()])  # [classes, 1 + predictors]
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("the predictors depend on each other")
    # Shares with weights: of counts of right and wrong answers statsmodels 0.15 leaves n out of the dispersion.
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerfectSeparationWarning)
        try:
            fit = sm.GLM(right / n, design, family=sm.families.Binomial(), var_weights=n).fit(scale="X2")
        except PerfectSeparationWarning:
            raise ValueError("the predictors tell right from wrong answers without a rest") from None
    width = t.ppf(0.975, freedom) * fit.bse
    return [
        Slope(name, float(fit.params[place]), float(fit.params[place] - width[place]),
              float(fit.params[place] + width[place]), float(fit.scale))
        for place, name in enumerate(predictors, start=1)
    ]  # fmt: skip


def log_odds(accuracy: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The log-odds of accuracies [classes], half an answer added to each side so that 0 and 1 are finite."""
    right = accuracy * n
    return np.log((right + 0.5) / (n - right + 0.5))
