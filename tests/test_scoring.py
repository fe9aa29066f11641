"""Protects: what counts as right, and the intervals."""

import pytest

from vlmclassifier.records import Prediction
from vlmclassifier.scoring import contains, empty, exact, score_predictions, wilson_interval


def said(output: str, label: str = "great white shark", index: int = 0, ranking=None) -> Prediction:
    return Prediction("a.jpg", label, index, "Q", None, output, None, ranking)


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
def test_worked_cases(output, is_contained, is_exact, is_empty):
    assert (contains(said(output)), exact(said(output)), empty(said(output))) == (is_contained, is_exact, is_empty)


def test_known_weaknesses_of_the_papers_metric():
    assert contains(said("a bumblebee", "bee")) and not exact(said("a bumblebee", "bee"))
    assert exact(said("acme inc.", "Acme Inc.")) and exact(said("Acme Inc", "Acme Inc."))
    assert contains(said('one of "bee", "ant", "cat"', "ant"))  # listing every name scores


def test_wilson_interval_against_the_formula():
    for hits, n in [(0, 10), (3, 10), (10, 10), (228, 1000)]:
        z, p = 1.959963984540054, hits / n
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        expected = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert wilson_interval(hits, n) == pytest.approx(expected, abs=1e-12)


def test_scores_of_free_text():
    rows = {
        r[0]: r[1:]
        for r in score_predictions([said("cat", "cat"), said("a cat", "cat"), said("", "dog")], ["cat", "dog"], "vlm")
    }
    of_text = {"mean_per_class", "contains_words", "unique", "no_class"}
    assert set(rows) == {"accuracy", "contains", "exact", "empty"} | of_text
    assert rows["accuracy"] == rows["contains"]
    assert [rows[m][0] for m in ("contains", "exact", "empty")] == pytest.approx([200 / 3, 100 / 3, 100 / 3])
    assert rows["contains"][3] == 3 and rows["contains"][1] < 200 / 3 < rows["contains"][2]


def test_double_names_are_scored_by_name_and_by_class():
    names = ["missile", "cat", "missile"]
    rows = [said("missile", "missile", 0, (0,)), said("missile", "missile", 2, (0,)), said("cat", "missile", 2, (1,))]
    for kind in ("clip", "vlm"):
        scores = {r[0]: r[1] for r in score_predictions(rows, names, kind)}
        assert scores["accuracy"] == pytest.approx(200 / 3)
        assert scores["accuracy_by_class"] == pytest.approx(100 / 3)
    assert "accuracy_by_class" not in {r[0] for r in score_predictions(rows, ["missile", "cat"], "clip")}
