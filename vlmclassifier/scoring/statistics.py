"""Comparisons of two sets of right and wrong answers: each an estimate with a 95% interval."""

from collections.abc import Sequence
from typing import NamedTuple

from vlmclassifier.scoring.intervals import wilson_interval

RESAMPLES = 2000  # of every bootstrap


class Estimate(NamedTuple):
    """A value with its 95% interval, and the number of images behind it."""

    value: float
    low: float
    high: float
    n: int


def proportion(hits: Sequence[bool]) -> Estimate:
    """An accuracy in percent with its Wilson interval. Raises ValueError without images."""
    if not hits:
        raise ValueError("no images")
    low, high = wilson_interval(sum(hits), len(hits))
    return Estimate(100 * sum(hits) / len(hits), 100 * low, 100 * high, len(hits))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """Accuracy of `first` minus that of `second` on the same images, in points; percentiles of a paired bootstrap."""
    import numpy as np

    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)  # [images]
    rng = np.random.default_rng(0)
    means = np.array([difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(RESAMPLES)])
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return Estimate(100 * difference.mean(), float(low), float(high), len(difference))


def independent_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """The same for two different sets of images, by Newcombe's interval (1998, method 10) from two Wilson intervals."""
    a, b = proportion(first), proportion(second)
    value = a.value - b.value
    low = value - ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
    high = value + ((a.high - a.value) ** 2 + (b.value - b.low) ** 2) ** 0.5
    return Estimate(value, low, high, a.n + b.n)


def error_ratio(model: Sequence[bool], reference: Sequence[bool]) -> Estimate:
    """Errors of one model per error of another on the same images, half an error added to each.

    The interval is that of a paired bootstrap (percentiles).
    """
    import numpy as np

    errors = 1.0 - np.stack([np.asarray(model, dtype=float), np.asarray(reference, dtype=float)])  # [2, images]
    rng, n = np.random.default_rng(0), errors.shape[1]
    counts = np.stack([errors[:, rng.integers(n, size=n)].sum(axis=1) for _ in range(RESAMPLES)]) + 0.5
    low, high = np.percentile(counts[:, 0] / counts[:, 1], [2.5, 97.5])
    value = (errors[0].sum() + 0.5) / (errors[1].sum() + 0.5)
    return Estimate(float(value), float(low), float(high), n)
