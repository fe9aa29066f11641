"""From saved answers to numbers, without a model: the metric registry, intervals, and the collector of scored runs."""

from vlmclassifier.scoring.intervals import class_counts, mean_per_class, wilson_interval
from vlmclassifier.scoring.mentions import Mentions, plain_words
from vlmclassifier.scoring.metrics import METRICS, PAPER_METRIC, Answers, Metric, contains, empty, exact, metric_hits

__all__ = [
    "METRICS", "PAPER_METRIC", "Answers", "Mentions", "Metric", "class_counts", "contains", "empty", "exact",
    "mean_per_class", "metric_hits", "plain_words", "wilson_interval",
]  # fmt: skip
