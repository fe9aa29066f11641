"""Protects: what each metric counts, with the answers on which they must disagree."""

from dataclasses import replace

import numpy as np
import pytest

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.records import Prediction, Reply, UserError
from vlmclassifier.scoring import Mentions, Scorer, differences, mean_per_class, plain_words, pooled
from vlmclassifier.scoring.mentions import maximal, plural
from vlmclassifier.scoring.semantic import Encoder
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


@pytest.mark.parametrize(
    ("name", "other", "answer", "words"),
    [
        ("かき", "かぎ", "かぎ", False),  # marks that are no accents tell words apart
        ("पता", "पति", "पति", False),
        ("पता", "पति", "यह पता है", True),
        ("猫", "犬", "这是一只猫。", True),  # no spaces between words
        ("ガラス", "カラス", "ガラスです", True),
        ("cat", "dog", "a c\u00adat", True),  # a soft hyphen
        ("ёлка", "стол", "Елка", True),  # Cyrillic accents are left out as Latin ones are
        ("ΆΝΘΟΣ", "x", "ανθος", True),
        ("Straße", "x", "STRASSE", True),
        ("ﬁg", "x", "a fig", True),  # a ligature
    ],
)
def test_words_of_other_scripts(name, other, answer, words):
    shown = Scorer((name, other), "vlm").hits([said(answer, name, names=(name, other))])
    assert (shown["contains_words"], shown["unique"]) == ([words], [words])


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
        ("great white shark", False, False, False),  # no candidate itself, but its part "shark" is one
        ("bee or shark", False, True, False),
        ("crane, bird", False, False, False),  # one candidate with a comma, not two
        ("bee, crane, bird, shark", False, True, True),
        ('"bee", "crane, bird"', False, True, False),
        ("shark, crane, bird, bee", False, True, False),  # another order is no echo
    ],
)
def test_fine_points_of_the_closed_world(output, none, several, echo):
    choices = ("bee", "crane, bird", "shark", "box")
    shown = [hit(m, output, "bee", choices) for m in ("no_candidate", "several_candidates", "echo")]
    assert shown == [none, several, echo]
    assert hit("echo", output, "bee") is None  # the open world has no list
    two = hit("echo", "bee, shark", "bee", ("bee", "shark"))
    assert two is True  # all of a list of two


IMAGENET = class_names(BENCHMARKS["imagenet"])
AGREED = next(file for file, classes in real_labels().items() if classes == (970, 795))  # people saw two classes
UNCLEAR = next(file for file, classes in real_labels().items() if not classes)  # people agreed on none


@pytest.mark.parametrize(
    ("output", "contained", "synonym"),
    [
        ("an electric ray", True, True),
        ("a numbfish", False, True),  # another name of the class in WordNet
        ("a CRAMPFISH", False, True),
        ("a stingray", False, False),
    ],
)
def test_imagenets_synonyms(output, contained, synonym):
    assert lemmas()[5] == ("electric ray", "crampfish", "numbfish", "torpedo") and IMAGENET[5] == "electric ray"
    shown = [hit(metric, output, "electric ray", names=IMAGENET) for metric in ("contains", "contains_synonym")]
    assert shown == [contained, synonym]
    assert hit("contains_synonym", output, "bee") is None  # other class lists have no WordNet names


@pytest.mark.parametrize(
    ("file", "output", "label", "kind", "accuracy", "real"),
    [
        (AGREED, f"the {IMAGENET[795]}", 0, "vlm", False, True),  # right for a class that people saw beside the label
        (AGREED, IMAGENET[970], 970, "vlm", True, True),
        (AGREED, IMAGENET[0], 0, "vlm", True, False),  # the label, which nobody saw
        (UNCLEAR, IMAGENET[0], 0, "vlm", True, None),  # not counted
        (AGREED, f"the {IMAGENET[795]}", 0, "clip", False, False),  # CLIP's answer is a name
        (AGREED, IMAGENET[970], 0, "clip", False, True),
        ("a/tench", IMAGENET[0], 0, "vlm", True, None),  # files without their ILSVRC names have no labels
    ],
)
def test_what_people_saw_in_imagenets_pictures(file, output, label, kind, accuracy, real):
    row = Prediction(f"val/{file}.JPEG", IMAGENET[label], label, "Q", None, output, None, None)
    other = Prediction(f"val/{AGREED}.JPEG", IMAGENET[970], 970, "Q", None, "", None, None)
    hits = Scorer(IMAGENET, kind).hits([row, other])
    assert (hits["accuracy"][0], hits["real"]) == (accuracy, [real, False])
    assert validation_file("x/ILSVRC2012_val_00000017.JPEG") == "ILSVRC2012_val_00000017"
    assert "real" not in Scorer(IMAGENET, kind).hits([said("tench", "tench", names=IMAGENET)])


@pytest.mark.parametrize(
    ("output", "contained", "make_model"),
    [
        ("a 2012 Audi A5 Coupe", True, True),
        ("an Audi A5 coupe", False, True),  # the paper's metric wants the year, in front
        ("Audi A5 Coupe 2012", False, True),
        ("an Audi A5 coupé", False, True),
        ("an Audi A5", False, False),
        ("an Audi A55 Coupe", False, False),  # whole words
    ],
)
def test_cars_count_without_their_year(output, contained, make_model):
    names, label = class_names(BENCHMARKS["cars"]), "2012 Audi A5 Coupe"
    assert hit("contains", output, label, names=names) is contained
    assert hit("make_model", output, label, names=names) is make_model
    assert hit("make_model", output, "a", names=("a", "b")) is None  # other class lists have no years


def test_refusals_are_those_of_apis():
    rows = [said("", "bee", reply=Reply(finish, "m", 1, 1)) for finish in ("refusal", "stop")]
    assert Scorer(NAMES, "api").hits(rows)["refusal"] == [True, False]


def test_the_mean_over_classes_and_its_interval():
    value, low, high = mean_per_class({0: (9, 10), 1: (0, 2)})
    assert value == pytest.approx(0.45) and 0.0 < low < 0.45 < high < 1.0
    assert mean_per_class({0: (1, 1)})[1] < 1.0  # one picture says little


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A real sentence-transformers folder whose words lie where we put them: a hound by a dog, a kitten by a cat."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"[UNK]": (0.1, 0.1, 0.1), "dog": (1, 0, 0), "hound": (0.9, 0.2, 0), "cat": (0, 1, 0),
             "kitten": (0.1, 0.8, 0), "fish": (0, 0, 1)}  # fmt: skip
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    module = StaticEmbedding(tokenizer, embedding_weights=np.array(list(words.values()), dtype=np.float32))
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return Encoder(folder, "cpu")


@pytest.mark.parametrize(
    ("output", "label", "choices", "contained", "semantic"),
    [
        ("a hound", "dog", None, False, True),  # no class is named, one is meant
        ("a kitten", "cat", None, False, True),
        ("a hound", "cat", None, False, False),
        ("dog, cat, cat, cat, cat", "dog", None, True, False),  # named, but not what the answer is about
        ("a kitten", "fish", ("dog", "fish"), False, False),
        ("a kitten", "dog", ("dog", "fish"), False, True),  # of the candidates the nearest
        ("", "dog", None, False, False),  # nothing said is near nothing
    ],
)
def test_the_nearest_class_in_meaning(encoder, output, label, choices, contained, semantic):
    names = ("dog", "cat", "fish")
    hits = Scorer(names, "vlm", encoder).hits([said(output, label, choices, names)])
    assert (hits["contains"], hits["semantic"]) == ([contained], [semantic])
    assert "semantic" not in Scorer(names, "clip", encoder).hits([said("dog", "dog", names=names)])


def test_a_folder_that_is_no_encoder_is_named(tmp_path, encoder):
    with pytest.raises(UserError, match="has no modules.json"):
        Encoder(tmp_path)
    for spoilt in ("[]x", "[1]", '[{"type": "nothing.Known", "path": ""}]'):
        (tmp_path / "modules.json").write_text(spoilt)
        with pytest.raises(UserError, match="cannot be loaded"):
            Encoder(tmp_path)
    encoder.model.save(str(tmp_path / "whole"))
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be loaded"):
        Encoder(tmp_path / "whole")


def test_differences_count_and_name_the_answers():
    rows = [said("a bumblebee", "bee"), said("a  bumblebee!", "bee"), said("a bumblebee", "bee"),
            said("berries", "berry"), said("a bee", "bee")]  # fmt: skip
    one = next(d for d in differences(rows, Scorer(NAMES, "vlm").hits(rows)) if d.metric == "contains_words")
    assert (one.n, one.paper_only, one.metric_only) == (5, 3, 1)
    assert one.paper_example == '"a bumblebee" for bee' and one.metric_example == '"berries" for berry'
    other = replace(one, paper_only=9, paper_example="other", metric_only=0, metric_example="")
    assert pooled([one, other]) == replace(one, n=10, paper_only=12, paper_example="other")
