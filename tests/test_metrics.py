"""Protects: what each metric counts, by example outputs on which the metrics must differ."""

from dataclasses import replace

import numpy as np
import pytest

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.records import Prediction, Reply, UserError
from vlmclassifier.scoring import Answers, Mentions, mean_per_class, metric_hits, plain_words
from vlmclassifier.scoring.class_facts import lemmas, real_labels, validation_file
from vlmclassifier.scoring.differences import differences, pooled
from vlmclassifier.scoring.mentions import longest_mentions, plural
from vlmclassifier.scoring.semantic import Encoder

NAMES = (
    "bee", "bumblebee", "shark", "great white shark", "limaçon", "crane, bird", "crane", "colt's foot", "box", "berry",
)  # fmt: skip


def prediction(output, label, choices=None, names=NAMES, **more) -> Prediction:
    return Prediction("a.jpg", label, names.index(label), "Q", choices, output, None, **more)


def all_hits(rows, names, kind, encoder=None) -> dict:
    return metric_hits(Answers(rows, tuple(names), kind, encoder))


def hit(metric: str, output: str, label: str, choices=None, names=NAMES, kind="vlm"):
    """Whether one output counts for one metric; None where the metric does not apply."""
    return all_hits([prediction(output, label, choices, names)], names, kind).get(metric, [None])[0]


@pytest.mark.parametrize(
    ("output", "label", "contained", "words", "unique"),
    [
        ("a bee", "bee", True, True, True),
        ("a bumblebee", "bee", True, False, False),  # inside a word
        ("A Great White Shark!", "great white shark", True, True, True),
        ("a great white shark", "shark", True, True, False),  # named only as part of a longer class name
        ("a great-white shark", "great white shark", False, True, True),  # punctuation
        ("great  white\nshark", "great white shark", False, True, True),
        ("a LIMACON", "limaçon", False, True, True),  # accents
        ("two boxes of berries", "box", True, True, False),  # plurals of two classes
        ("berries", "berry", False, True, True),
        ("bees", "bee", True, True, True),
        ("colt’s foot", "colt's foot", False, True, True),  # typographic apostrophe
        ("crane, bird", "crane, bird", True, True, True),  # a name with a comma
        ("crane, bird", "crane", True, True, False),
        ("bee, bumblebee, shark, great white shark", "shark", True, True, False),  # a list of names does not count
        ("a bee. Yes, a bee.", "bee", True, True, True),  # one class, twice
        ("a shark, not a great white shark", "shark", True, True, False),
        ("", "bee", False, False, False),
    ],
)
def test_paper_metric_and_word_metrics(output, label, contained, words, unique):
    assert [hit(m, output, label) for m in ("contains", "contains_words", "unique")] == [contained, words, unique]
    assert hit("no_class", output, label) is (output == "")


@pytest.mark.parametrize(
    ("name", "other", "answer", "words"),
    [
        ("かき", "かぎ", "かぎ", False),  # marks that are not accents distinguish words
        ("पता", "पति", "पति", False),
        ("पता", "पति", "यह पता है", True),
        ("猫", "犬", "这是一只猫。", True),  # no spaces between words
        ("ガラス", "カラス", "ガラスです", True),
        ("cat", "dog", "a c\u00adat", True),  # a soft hyphen
        ("ёлка", "стол", "Елка", True),  # Cyrillic accents are removed like Latin ones
        ("ΆΝΘΟΣ", "x", "ανθος", True),
        ("Straße", "x", "STRASSE", True),
        ("ﬁg", "x", "a fig", True),  # a ligature
    ],
)
def test_word_metrics_in_other_scripts(name, other, answer, words):
    hits = all_hits([prediction(answer, name, names=(name, other))], (name, other), "vlm")
    assert (hits["contains_words"], hits["unique"]) == ([words], [words])


def test_words_and_plurals():
    assert plain_words("  Saint-Bernard's ＤＯＧ_house (big) ") == "saint bernard s dog house big"
    assert [plural(w) for w in ("cat", "box", "berry", "toy", "bus", "finch")] == [
        "cats", "boxes", "berries", "toys", "buses", "finches"]  # fmt: skip
    mentions = Mentions(["sunglass", "sunglasses", "..."])  # the plural is another class
    assert longest_mentions(mentions.find("Sunglasses")) == [{"sunglasses"}]
    assert longest_mentions(mentions.find("sunglass")) == [{"sunglass"}]


@pytest.mark.parametrize(
    ("output", "no_candidate", "several", "echo"),
    [
        ("bee", False, False, False),
        ("a dog", True, False, False),
        ("great white shark", False, False, False),  # not a candidate, but it contains the candidate "shark"
        ("bee or shark", False, True, False),
        ("crane, bird", False, False, False),  # one candidate with a comma, not two
        ("bee, crane, bird, shark", False, True, True),
        ('"bee", "crane, bird"', False, True, False),
        ("shark, crane, bird, bee", False, True, False),  # a different order is not an echo
    ],
)
def test_closed_world_metrics(output, no_candidate, several, echo):
    choices = ("bee", "crane, bird", "shark", "box")
    hits = [hit(m, output, "bee", choices) for m in ("no_candidate", "several_candidates", "echo")]
    assert hits == [no_candidate, several, echo]
    assert hit("echo", output, "bee") is None  # the open world has no candidate list
    assert hit("echo", "bee, shark", "bee", ("bee", "shark")) is True  # all of a list of two


IMAGENET = class_names(BENCHMARKS["imagenet"])
RELABELED = next(file for file, classes in real_labels().items() if classes == (970, 795))  # two ReaL labels
UNLABELED = next(file for file, classes in real_labels().items() if not classes)  # no ReaL label


@pytest.mark.parametrize(
    ("output", "contained", "synonym"),
    [
        ("an electric ray", True, True),
        ("a numbfish", False, True),  # another name of the class in WordNet
        ("a CRAMPFISH", False, True),
        ("a stingray", False, False),
    ],
)
def test_imagenet_synonyms(output, contained, synonym):
    assert lemmas()[5] == ("electric ray", "crampfish", "numbfish", "torpedo") and IMAGENET[5] == "electric ray"
    hits = [hit(metric, output, "electric ray", names=IMAGENET) for metric in ("contains", "contains_synonym")]
    assert hits == [contained, synonym]
    assert hit("contains_synonym", output, "bee") is None  # other class lists have no WordNet synonyms


@pytest.mark.parametrize(
    ("file", "output", "label", "kind", "accuracy", "real"),
    [
        (RELABELED, f"the {IMAGENET[795]}", 0, "vlm", False, True),  # names a ReaL label that is not the label
        (RELABELED, IMAGENET[970], 970, "vlm", True, True),
        (RELABELED, IMAGENET[0], 0, "vlm", True, False),  # the label, which is not a ReaL label
        (UNLABELED, IMAGENET[0], 0, "vlm", True, None),  # not counted
        (RELABELED, f"the {IMAGENET[795]}", 0, "clip", False, False),  # CLIP's output is a class name
        (RELABELED, IMAGENET[970], 0, "clip", False, True),
        ("a/tench", IMAGENET[0], 0, "vlm", True, None),  # no ReaL labels without the ILSVRC file name
    ],
)
def test_imagenet_real_labels(file, output, label, kind, accuracy, real):
    row = Prediction(f"val/{file}.JPEG", IMAGENET[label], label, "Q", None, output, None)
    other = Prediction(f"val/{RELABELED}.JPEG", IMAGENET[970], 970, "Q", None, "", None)
    hits = all_hits([row, other], IMAGENET, kind)
    assert (hits["accuracy"][0], hits["real"]) == (accuracy, [real, False])
    assert validation_file("x/ILSVRC2012_val_00000017.JPEG") == "ILSVRC2012_val_00000017"
    assert "real" not in all_hits([prediction("tench", "tench", names=IMAGENET)], IMAGENET, kind)


@pytest.mark.parametrize(
    ("output", "contained", "make_model"),
    [
        ("a 2012 Audi A5 Coupe", True, True),
        ("an Audi A5 coupe", False, True),  # the paper's metric needs the year in front
        ("Audi A5 Coupe 2012", False, True),
        ("an Audi A5 coupé", False, True),
        ("an Audi A5", False, False),
        ("an Audi A55 Coupe", False, False),  # whole words
    ],
)
def test_make_model_ignores_the_year(output, contained, make_model):
    names, label = class_names(BENCHMARKS["cars"]), "2012 Audi A5 Coupe"
    assert hit("contains", output, label, names=names) is contained
    assert hit("make_model", output, label, names=names) is make_model
    assert hit("make_model", output, "a", names=("a", "b")) is None  # other class lists have no years


def test_api_refusals_are_counted():
    rows = [prediction("", "bee", reply=Reply(finish, "m", 1, 1)) for finish in ("refusal", "stop")]
    assert all_hits(rows, NAMES, "api")["refusal"] == [True, False]


def test_mean_per_class_and_its_interval():
    value, low, high = mean_per_class({0: (9, 10), 1: (0, 2)})
    assert value == pytest.approx(0.45) and 0.0 < low < 0.45 < high < 1.0
    assert mean_per_class({0: (1, 1)})[1] < 1.0  # one image leaves a wide interval


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A real sentence-transformers folder with chosen word vectors: hound is near dog and kitten is near cat."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vectors = {"[UNK]": (0.1, 0.1, 0.1), "dog": (1, 0, 0), "hound": (0.9, 0.2, 0), "cat": (0, 1, 0),
             "kitten": (0.1, 0.8, 0), "fish": (0, 0, 1)}  # fmt: skip
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(vectors)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path_factory.mktemp("encoder")
    module = StaticEmbedding(tokenizer, embedding_weights=np.array(list(vectors.values()), dtype=np.float32))
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return Encoder(folder, "cpu")


@pytest.mark.parametrize(
    ("output", "label", "choices", "contained", "semantic"),
    [
        ("a hound", "dog", None, False, True),  # no class is named, but dog is the nearest
        ("a kitten", "cat", None, False, True),
        ("a hound", "cat", None, False, False),
        ("dog, cat, cat, cat, cat", "dog", None, True, False),  # dog is named, but cat is the nearest
        ("a kitten", "fish", ("dog", "fish"), False, False),
        ("a kitten", "dog", ("dog", "fish"), False, True),  # the nearest among the candidates
        ("", "dog", None, False, False),  # an empty output has no nearest class
    ],
)
def test_semantic_metric_takes_the_nearest_class(encoder, output, label, choices, contained, semantic):
    names = ("dog", "cat", "fish")
    hits = all_hits([prediction(output, label, choices, names)], names, "vlm", encoder)
    assert (hits["contains"], hits["semantic"]) == ([contained], [semantic])
    assert "semantic" not in all_hits([prediction("dog", "dog", names=names)], names, "clip", encoder)


def test_folder_without_an_encoder_is_reported(tmp_path, encoder):
    with pytest.raises(UserError, match="has no modules.json"):
        Encoder(tmp_path)
    for corrupt in ("[]x", "[1]", '[{"type": "nothing.Known", "path": ""}]'):
        (tmp_path / "modules.json").write_text(corrupt)
        with pytest.raises(UserError, match="cannot be loaded"):
            Encoder(tmp_path)
    encoder.model.save(str(tmp_path / "whole"))
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="cannot be loaded"):
        Encoder(tmp_path / "whole")


def test_differences_have_counts_and_examples():
    rows = [prediction("a bumblebee", "bee"), prediction("a  bumblebee!", "bee"), prediction("a bumblebee", "bee"),
            prediction("berries", "berry"), prediction("a bee", "bee")]  # fmt: skip
    difference = next(d for d in differences(rows, all_hits(rows, NAMES, "vlm")) if d.metric == "contains_words")
    assert (difference.n, difference.paper_only, difference.metric_only) == (5, 3, 1)
    assert difference.paper_example == '"a bumblebee" for bee'
    assert difference.metric_example == '"berries" for berry'
    other = replace(difference, paper_only=9, paper_example="other", metric_only=0, metric_example="")
    assert pooled([difference, other]) == replace(difference, n=10, paper_only=12, paper_example="other")
