"""Protects: what each metric counts, with the answers on which they must disagree."""

import pytest

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.records import Prediction, Reply
from vlmclassifier.scoring import Mentions, Scorer, mean_per_class, plain_words
from vlmclassifier.scoring.mentions import maximal, plural
from vlmclassifier.scoring.metrics import disagreements
from vlmclassifier.scoring.special import lemmas, real_labels, validation_file

NAMES = (
    "bee", "bumblebee", "shark", "great white shark", "limaçon", "crane, bird", "crane", "colt's foot", "box", "berry",
)  # fmt: skip


def said(output, label, choices=None, names=NAMES, **more) -> Prediction:
    return Prediction("a.jpg", label, names.index(label), "Q", choices, output, None, None, **more)


def hit(metric: str, output: str, label: str, choices=None, names=NAMES, kind="vlm"):
    return Scorer(names, kind).hits([said(output, label, choices, names)]).get(metric, [None])[0]


@pytest.mark.parametrize(
    ("output", "label", "contained", "words", "unique"),
    [
        ("a bee", "bee", True, True, True),
        ("a bumblebee", "bee", True, False, False),  # inside a word
        ("A Great White Shark!", "great white shark", True, True, True),
        ("a great white shark", "shark", True, True, False),  # mentioned, but as part of a longer name
        ("a great-white shark", "great white shark", False, True, True),  # punctuation
        ("great  white\nshark", "great white shark", False, True, True),
        ("a LIMACON", "limaçon", False, True, True),  # accents
        ("two boxes of berries", "box", True, True, False),  # plurals; two classes
        ("berries", "berry", False, True, True),
        ("bees", "bee", True, True, True),
        ("colt’s foot", "colt's foot", False, True, True),  # a typographer's apostrophe
        ("crane, bird", "crane, bird", True, True, True),  # a name with a comma
        ("crane, bird", "crane", True, True, False),
        ("bee, bumblebee, shark, great white shark", "shark", True, True, False),  # a list scores nothing
        ("a bee. Yes, a bee.", "bee", True, True, True),  # one class, twice
        ("a shark, not a great white shark", "shark", True, True, False),
        ("", "bee", False, False, False),
    ],
)
def test_worked_cases(output, label, contained, words, unique):
    assert [hit(m, output, label) for m in ("contains", "contains_words", "unique")] == [contained, words, unique]
    assert hit("no_class", output, label) is (output == "")


def test_words_and_plurals():
    assert plain_words("  Saint-Bernard's ＤＯＧ_house (big) ") == "saint bernard s dog house big"
    assert [plural(w) for w in ("cat", "box", "berry", "toy", "bus", "finch")] == [
        "cats", "boxes", "berries", "toys", "buses", "finches"]  # fmt: skip
    both = Mentions(["sunglass", "sunglasses", "..."])  # a plural that is a class of its own
    assert maximal(both.find("Sunglasses")) == [{"sunglasses"}] and maximal(both.find("sunglass")) == [{"sunglass"}]


@pytest.mark.parametrize(
    ("output", "none", "several", "echo"),
    [
        ("bee", False, False, False),
        ("a dog", True, False, False),
        ("great white shark", True, False, False),  # a class, but no candidate: its part "shark" is one
        ("bee or shark", False, True, False),
        ("crane, bird", False, False, False),  # one candidate with a comma, not two
        ("bee, crane, bird, shark", False, True, True),
        ('"bee", "crane, bird"', False, True, False),
        ("shark, crane, bird, bee", False, True, False),  # another order is no echo
    ],
)
def test_fine_points_of_the_closed_world(output, none, several, echo):
    choices = ("bee", "crane, bird", "shark", "box")
    none = False if output == "great white shark" else none
    shown = [hit(m, output, "bee", choices) for m in ("no_candidate", "several_candidates", "echo")]
    assert shown == [none, several, echo]
    assert hit("echo", output, "bee") is None  # the open world has no list
    two = hit("echo", "bee, shark", "bee", ("bee", "shark"))
    assert two is True  # all of a list of two


def test_imagenet_has_synonyms_and_real_labels():
    names = class_names(BENCHMARKS["imagenet"])
    assert lemmas()[5] == ("electric ray", "crampfish", "numbfish", "torpedo") and names[5] == "electric ray"
    rows = [said("a numbfish", "electric ray", names=names), said("a stingray", "electric ray", names=names)]
    assert Scorer(names, "vlm").hits(rows)["contains_synonym"] == [True, False]
    assert "contains_synonym" not in Scorer(names[:10], "vlm").hits([said("tench", "tench", names=names)])
    file = next(name for name, classes in real_labels().items() if classes == (970, 795))
    none = next(name for name, classes in real_labels().items() if not classes)
    said_of = ((file, f"the {names[795]}"), (file, names[970]), (file, names[0]), (none, names[0]))
    rows = [Prediction(f"{stem}.JPEG", names[0], 0, "Q", None, output, None, None) for stem, output in said_of]
    assert Scorer(names, "vlm").hits(rows)["real"] == [True, True, False, None]
    assert Scorer(names, "clip").hits(rows)["real"] == [False, True, False, None]  # CLIP's answer is a name
    assert validation_file("x/ILSVRC2012_val_00000017.JPEG") == "ILSVRC2012_val_00000017"
    assert "real" not in Scorer(names, "vlm").hits([said("tench", "tench", names=names)])


def test_cars_count_without_their_year():
    names = class_names(BENCHMARKS["cars"])
    label = "2012 Audi A5 Coupe"
    assert hit("contains", "an Audi A5 coupe", label, names=names) is False


def test_refusals_are_those_of_apis():
    rows = [said("", "bee", reply=Reply(finish, "m", 1, 1)) for finish in ("refusal", "stop")]
    assert Scorer(NAMES, "api").hits(rows)["refusal"] == [True, False]


def test_the_mean_over_classes_and_its_interval():
    value, low, high = mean_per_class({0: (9, 10), 1: (0, 2)})
    assert value == pytest.approx(0.45) and 0.0 < low < 0.45 < high < 1.0
    assert mean_per_class({0: (1, 1)})[1] < 1.0  # one picture says little


def test_disagreements_name_the_answers():
    rows = [said("a bumblebee", "bee"), said("berries", "berry"), said("a bee", "bee")]
    alone, papers = disagreements(rows, Scorer(NAMES, "vlm").hits(rows))["contains_words"]
    assert alone == [rows[1]] and papers == [rows[0]]
