"""Protects: which outputs count as correct, and the confidence intervals."""

import pytest

from vlmclassifier.records import Prediction
from vlmclassifier.scoring import METRICS, Answers, contains, empty, exact, metric_hits, wilson_interval


def prediction(output: str, label: str = "great white shark", index: int = 0, ranking=None) -> Prediction:
    return Prediction("a.jpg", label, index, "Q", None, output, ranking)


def summaries(rows: list[Prediction], names: list[str], kind: str) -> dict[str, tuple]:
    """(value, low, high, n) in percent of every metric that applies."""
    answers = Answers(rows, tuple(names), kind)
    percent = {}
    for name, hits in metric_hits(answers).items():
        value, low, high, n = METRICS[name].summary(answers, hits)
        percent[name] = (100 * value, 100 * low, 100 * high, n)
    return percent


@pytest.mark.parametrize(
    ("output", "is_contained", "is_exact", "is_empty"),
    [
        ("great white shark", True, True, False),
        ("  Great White Shark.\n", True, True, False),
        ("The photo features a great white shark in water", True, False, False),
        ("a great white sharks' tooth", True, False, False),  # a substring is enough for the paper's metric
        ("white shark", False, False, False),
        ("great  white shark", False, False, False),
        ("", False, False, True),
        (" \n", False, False, True),
        (".", False, False, False),
    ],
)
def test_contains_exact_and_empty(output, is_contained, is_exact, is_empty):
    row = prediction(output)
    assert (contains(row), exact(row), empty(row)) == (is_contained, is_exact, is_empty)


def test_known_weaknesses_of_the_papers_metric():
    assert contains(prediction("a bumblebee", "bee")) and not exact(prediction("a bumblebee", "bee"))
    assert exact(prediction("acme inc.", "Acme Inc.")) and exact(prediction("Acme Inc", "Acme Inc."))
    assert contains(prediction('one of "bee", "ant", "cat"', "ant"))  # a list of all names counts


def test_wilson_interval_equals_the_formula():
    for hits, n in [(0, 10), (3, 10), (10, 10), (228, 1000)]:
        z, p = 1.959963984540054, hits / n
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        expected = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert wilson_interval(hits, n) == pytest.approx(expected, abs=1e-12)


def test_scores_of_free_text():
    scores = summaries(
        [prediction("cat", "cat"), prediction("a cat", "cat"), prediction("", "dog")], ["cat", "dog"], "vlm"
    )
    text_metrics = {"mean_per_class", "contains_words", "unique", "no_class"}
    assert set(scores) == {"accuracy", "contains", "exact", "empty"} | text_metrics
    assert scores["accuracy"] == scores["contains"]
    assert [scores[m][0] for m in ("contains", "exact", "empty")] == pytest.approx([200 / 3, 100 / 3, 100 / 3])
    assert scores["contains"][3] == 3 and scores["contains"][1] < 200 / 3 < scores["contains"][2]


def test_duplicate_names_are_scored_by_name_and_by_class():
    names = ["missile", "cat", "missile"]
    rows = [
        prediction("missile", "missile", 0, (0,)),
        prediction("missile", "missile", 2, (0,)),
        prediction("cat", "missile", 2, (1,)),
    ]
    for kind in ("clip", "vlm"):
        scores = {name: values[0] for name, values in summaries(rows, names, kind).items()}
        assert scores["accuracy"] == pytest.approx(200 / 3)
        assert scores["accuracy_by_class"] == pytest.approx(100 / 3)
    assert "accuracy_by_class" not in summaries(rows, ["missile", "cat"], "clip")
