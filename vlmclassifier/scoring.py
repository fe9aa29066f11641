"""From saved answers to numbers, without a model: every metric by name, with 95% intervals."""

from collections.abc import Callable, Sequence

from vlmclassifier.records import Prediction

PAPER_METRIC = {
    "vlm": "contains",
    "api": "contains",
    "clip": "exact",
    "ranking": "exact",
}  # by model kind: what the paper calls accuracy


def contains(prediction: Prediction) -> bool:
    """The lower-cased label is a substring of the lower-cased answer: the paper's metric (section 1).

    Identity by name: an answer "missile" is right for both of ImageNet's classes of that name.
    """
    return prediction.label.lower() in prediction.output.lower()


def exact(prediction: Prediction) -> bool:
    """The answer is the label, letter case, outer white space and a final full stop aside. Identity by name."""
    return _bare(prediction.output) == _bare(prediction.label)


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()


def empty(prediction: Prediction) -> bool:
    """The model said nothing."""
    return not prediction.output.strip()


METRICS: dict[str, Callable[[Prediction], bool]] = {"contains": contains, "exact": exact, "empty": empty}


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions in [0, 1] (scipy)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def score_predictions(
    predictions: Sequence[Prediction], names: Sequence[str], kind: str
) -> list[tuple[str, float, float, float, int]]:
    """Rows (metric, value, low, high, n) in percent for one run: "accuracy" is the paper's metric for this kind.

    Where two classes share a name, the accuracy is given by class index too ("accuracy_by_class"): a shared name then
    stands for the first class that bears it, since an answer in words cannot say which one it means.
    """
    hits = {"accuracy": [METRICS[PAPER_METRIC[kind]](p) for p in predictions]}
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    if len(first) < len(names):
        pairs = zip(hits["accuracy"], predictions, strict=True)
        hits["accuracy_by_class"] = [hit and p.class_index == first[p.label] for hit, p in pairs]
    hits |= {name: [metric(p) for p in predictions] for name, metric in METRICS.items()}
    rows = []
    for name, results in hits.items():
        low, high = wilson_interval(sum(results), len(results))
        rows.append((name, 100 * sum(results) / len(results), 100 * low, 100 * high, len(results)))
    return rows
