"""95% intervals of proportions and of their mean over classes."""

from collections.abc import Sequence


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions in [0, 1] (scipy)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def class_counts(class_indices: Sequence[int], hits: Sequence[bool]) -> dict[int, tuple[int, int]]:
    """Right answers and images of each class, by class index in order."""
    counts: dict[int, list[int]] = {}
    for index, hit in zip(class_indices, hits, strict=True):
        count = counts.setdefault(index, [0, 0])
        count[0] += hit
        count[1] += 1
    return {index: (right, n) for index, (right, n) in sorted(counts.items())}


def mean_per_class(counts: dict[int, tuple[int, int]]) -> tuple[float, float, float]:
    """Mean of the classes' accuracies with a 95% interval, as fractions in [0, 1].

    A normal interval from each class's own variance with one right and one wrong answer added, so that a class of one
    image has a variance too.
    """
    value = sum(right / n for right, n in counts.values()) / len(counts)
    variance = 0.0
    for right, n in counts.values():
        p = (right + 1) / (n + 2)
        variance += p * (1 - p) / n
    half = 1.959964 * variance**0.5 / len(counts)
    return value, max(0.0, value - half), min(1.0, value + half)
