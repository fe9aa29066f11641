"""Where a metric disagrees with the paper's: how often, and on which answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmclassifier.records import Prediction
from vlmclassifier.scoring.metrics import METRICS, Hit

SHOWN = 60  # letters of an example's answer


@dataclass(frozen=True)
class Difference:
    """One metric beside the paper's on the answers of one run or of several."""

    metric: str
    n: int  # answers that both metrics judge
    paper_only: int  # right by the paper's metric alone
    metric_only: int  # right by this one alone
    paper_example: str  # the most frequent answer of each kind, with its label; "" where there is none
    metric_example: str


def differences(predictions: Sequence[Prediction], hits: Mapping[str, Sequence[Hit]]) -> list[Difference]:
    """Each metric that judges answers beside the paper's ("accuracy"), over the same answers."""
    found = []
    for metric in [metric.name for metric in METRICS.values() if metric.judges and metric.name in hits]:
        paper_only: list[Prediction] = []
        metric_only: list[Prediction] = []
        judged = 0
        for prediction, hit, papers in zip(predictions, hits[metric], hits["accuracy"], strict=True):
            if hit is None:
                continue
            judged += 1
            if papers and not hit:
                paper_only.append(prediction)
            if hit and not papers:
                metric_only.append(prediction)
        examples = (_most_frequent(paper_only), _most_frequent(metric_only))
        found.append(Difference(metric, judged, len(paper_only), len(metric_only), *examples))
    return found


def pooled(parts: Sequence[Difference]) -> Difference:
    """The differences of one metric over several runs: sums, and the examples of the run that has most of them."""
    papers = max(parts, key=lambda part: part.paper_only)
    own = max(parts, key=lambda part: part.metric_only)
    return Difference(
        parts[0].metric, sum(part.n for part in parts), sum(part.paper_only for part in parts),
        sum(part.metric_only for part in parts), papers.paper_example, own.metric_example,
    )  # fmt: skip


def _most_frequent(predictions: Sequence[Prediction]) -> str:
    """Answer and label that occur most often, the shorter first, as one readable line."""
    if not predictions:
        return ""
    counts = Counter((prediction.output, prediction.label) for prediction in predictions)
    (output, label), _ = min(counts.items(), key=lambda item: (-item[1], len(item[0][0]), item[0]))
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in output).split())
    return f'"{words if len(words) <= SHOWN else words[:SHOWN].rstrip() + "..."}" for {label}'
