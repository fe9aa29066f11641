"""From saved answers to numbers, without a model: every metric by name, with 95% intervals."""

from vlmclassifier.scoring.differences import Difference, differences, pooled
from vlmclassifier.scoring.intervals import by_class, mean_per_class, wilson_interval
from vlmclassifier.scoring.mentions import Mentions, plain_words
from vlmclassifier.scoring.metrics import (
    METRICS,
    PAPER_METRIC,
    Scorer,
    contains,
    empty,
    exact,
    score_predictions,
    summarise,
)

__all__ = [
    "METRICS", "PAPER_METRIC", "Difference", "Mentions", "Scorer", "by_class", "contains", "differences", "empty",
    "exact", "mean_per_class", "plain_words", "pooled", "score_predictions", "summarise", "wilson_interval",
]  # fmt: skip
