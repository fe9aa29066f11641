"""Comparisons of two sets of right and wrong answers: each an estimate with a 95% interval."""

from collections.abc import Sequence
from typing import NamedTuple

from vlmclassifier.scoring.intervals import wilson_interval

RESAMPLES = 2000  # of every bootstrap
DRAWS = 20_000  # from the posterior of an error ratio
MIN_ERRORS = 5  # of the reference, below which an error ratio says little


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


def ratio_of_errors(model_errors: float, reference_errors: float) -> float:
    """Errors of one model per error of another, half an error added to each, so that nothing is divided by zero."""
    return (model_errors + 0.5) / (reference_errors + 0.5)


def error_ratio(model: Sequence[bool], reference: Sequence[bool]) -> Estimate:
    """Errors of one model per error of another on the same images.

    The interval is that of the posterior of the 2 x 2 table of both models' errors (Dirichlet, Jeffreys' prior). Its
    coverage is near 95% for error rates from 0.1% to 50%, also where the reference hardly errs; a bootstrap's is not,
    because it never draws an error that did not occur.
    """
    import numpy as np

    wrong = ~np.stack([np.asarray(model, dtype=bool), np.asarray(reference, dtype=bool)])  # [2, images]
    table = np.array([(wrong[0] & wrong[1]).sum(), (wrong[0] & ~wrong[1]).sum(), (~wrong[0] & wrong[1]).sum(),
                      (~wrong[0] & ~wrong[1]).sum()])  # fmt: skip
    shares = np.random.default_rng(0).dirichlet(table + 0.5, size=DRAWS)  # [draws, 4]
    low, high = np.percentile((shares[:, 0] + shares[:, 1]) / (shares[:, 0] + shares[:, 2]), [2.5, 97.5])
    value = ratio_of_errors(int(wrong[0].sum()), int(wrong[1].sum()))
    return Estimate(value, float(low), float(high), wrong.shape[1])


def error_ratio_slope(counts: Sequence[int], models: Sequence[Sequence[bool]],
                      references: Sequence[Sequence[bool]]) -> Estimate:  # fmt: skip
    """The slope of the log of `error_ratio` on the log of the number of candidates, over the same images.

    `models`, `references`: right answers by number of candidates, each in the order of the images. Below 0: the ratio
    rises as the candidates become fewer. The interval is a Bayesian bootstrap over the images (Rubin, 1981).
    """
    import numpy as np

    wrong = 1.0 - np.array([models, references], dtype=float)  # [2, counts, images]
    x = np.log(counts)
    x = (x - x.mean()) / ((x - x.mean()) ** 2).sum()  # [counts] the slope is the product with the log ratios

    def slope(errors: np.ndarray) -> np.ndarray:
        return np.log(ratio_of_errors(errors[0], errors[1])) @ x  # errors [2, ..., counts]

    images = wrong.shape[-1]
    weights = images * np.random.default_rng(0).dirichlet(np.ones(images), size=RESAMPLES)  # [draws, images]
    low, high = np.percentile(slope(np.stack([weights @ errors.T for errors in wrong])), [2.5, 97.5])
    return Estimate(float(slope(wrong.sum(axis=-1))), float(low), float(high), images)
