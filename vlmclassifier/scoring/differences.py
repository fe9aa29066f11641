"""Where the metrics disagree with the paper's: how often, and on which answers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmclassifier.records import Prediction

# The metrics that decide on right or wrong; the others are shares.
COMPARED = ("exact", "contains_words", "unique", "contains_synonym", "make_model", "real", "semantic")
SHOWN = 60  # letters of an example's answer


@dataclass(frozen=True)
class Difference:
    """One metric beside the paper's on the answers of one run or of several."""

    metric: str
    n: int  # answers that both metrics judge
    paper_only: int  # right by the paper's metric alone
    metric_only: int  # right by this one alone
    paper_example: str  # the commonest answer of each kind, the label behind it; "" where there is none
    metric_example: str


def differences(predictions: Sequence[Prediction], hits: Mapping[str, Sequence[bool | None]]) -> list[Difference]:
    """Each metric of COMPARED that applies beside the paper's ("accuracy"), over the same answers."""
    found = []
    for metric in [name for name in COMPARED if name in hits]:
        judged = [
            (p, mine, papers)
            for p, mine, papers in zip(predictions, hits[metric], hits["accuracy"], strict=True)
            if mine is not None
        ]
        papers_only = [p for p, mine, papers in judged if papers and not mine]
        metric_only = [p for p, mine, papers in judged if mine and not papers]
        counts, examples = (len(papers_only), len(metric_only)), (_commonest(papers_only), _commonest(metric_only))
        found.append(Difference(metric, len(judged), *counts, *examples))
    return found


def pooled(parts: Sequence[Difference]) -> Difference:
    """The differences of one metric over several runs: sums, and the examples of the run that has most of them."""
    papers, own = max(parts, key=lambda part: part.paper_only), max(parts, key=lambda part: part.metric_only)
    sums = (sum(getattr(part, name) for part in parts) for name in ("n", "paper_only", "metric_only"))
    return Difference(parts[0].metric, *sums, papers.paper_example, own.metric_example)


def _commonest(predictions: Sequence[Prediction]) -> str:
    """Answer and label of the kind that occurs most often, the shorter first, as one readable line."""
    if not predictions:
        return ""
    counts = Counter((p.output, p.label) for p in predictions)
    (output, label), _ = min(counts.items(), key=lambda item: (-item[1], len(item[0][0]), item[0]))
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in output).split())
    return f'"{words if len(words) <= SHOWN else words[:SHOWN].rstrip() + "..."}" for {label}'
