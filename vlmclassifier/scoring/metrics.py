"""The metric registry. One entry of METRICS says a metric's name, to which runs it applies and how it is computed.

The tables take their columns from it, `scores.csv` its rows. docs/adding_a_metric.md shows how to add one.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from vlmclassifier.class_lists import first_index
from vlmclassifier.records import Prediction
from vlmclassifier.scoring import class_facts
from vlmclassifier.scoring.intervals import class_counts, mean_per_class, wilson_interval
from vlmclassifier.scoring.mentions import Mention, Mentions, all_named, longest_mentions, plain_words
from vlmclassifier.thoughts import final_answer

if TYPE_CHECKING:
    from vlmclassifier.scoring.semantic import Encoder

# By kind of run: what the paper calls accuracy.
PAPER_METRIC = {"vlm": "contains", "api": "contains", "clip": "exact", "ranking": "exact", "probe": "exact"}
TEXT_KINDS = ("vlm", "api")  # answers in words
SHORT_LIST = 30  # mentions whose places are looked up in the list itself, which costs less than an index of it
ECHO_LENGTH = 3  # so many candidates in the order of the list are an echo of it

Hit = bool | None  # None: this image does not count
Interval = tuple[float, float, float, int]  # value, low, high as fractions; n


@dataclass
class Answers:
    """The answers of one run, or of one scoring variant of a ranking, with what several metrics need of them."""

    predictions: Sequence[Prediction]  # of a thinking model: `output` without the thought
    names: tuple[str, ...]  # the class list
    kind: str  # vlm, clip, api or ranking
    encoder: "Encoder | None" = None  # adds the metric "semantic"
    ranked_first: Sequence[bool] | None = None  # of a ranking: whether the true name is first ...
    ranked_among_five: Sequence[bool] | None = None  # ... and among the first five; None where that is not known
    mentions: Mentions | None = None
    cut: list[bool] = field(default_factory=list)  # whether each answer is missing: only its thought was written
    _found: dict[str, list[Mention]] = field(default_factory=dict, repr=False)  # answers repeat

    def __post_init__(self) -> None:
        if self.is_text:
            answers = [final_answer(prediction.output, prediction.prompt) for prediction in self.predictions]
            self.cut = [
                is_cut or _budget_is_spent(prediction)
                for prediction, (_, is_cut) in zip(self.predictions, answers, strict=True)
            ]
            self.predictions = [
                prediction if prediction.output == output else replace(prediction, output=output)
                for prediction, (output, _) in zip(self.predictions, answers, strict=True)
            ]

    @cached_property
    def first_index(self) -> dict[str, int]:
        """The first class index of each name."""
        return first_index(self.names)

    @property
    def has_shared_names(self) -> bool:
        """Whether two classes have one name."""
        return len(self.first_index) < len(self.names)

    @property
    def is_text(self) -> bool:
        """Whether the answers are in words."""
        return self.kind in TEXT_KINDS

    @property
    def has_candidates(self) -> bool:
        """Whether any image has a list of candidates."""
        return any(prediction.choices is not None for prediction in self.predictions)

    @cached_property
    def right(self) -> list[bool]:
        """Whether each answer is right by the paper's metric for this kind of run."""
        if self.ranked_first is not None:
            return [bool(hit) for hit in self.ranked_first]
        if self.is_text:
            return [contains(prediction) for prediction in self.predictions]
        return [self._is_right_class(prediction) for prediction in self.predictions]

    def _is_right_class(self, prediction: Prediction) -> bool:
        """Whether the first class of a ranking is that of the label; equal names stand for the first of them.

        By the class index, since names may differ in letter case alone. Imported answers of CLIP have names only.
        """
        if prediction.ranking is None:
            return exact(prediction)
        return prediction.ranking[0] == self.first_index[prediction.label]

    @cached_property
    def found(self) -> list[list[Mention]]:
        """All mentions of class names in each answer."""
        mentions = self.mentions or Mentions(self.names)
        for prediction in self.predictions:
            if prediction.output not in self._found:
                self._found[prediction.output] = mentions.find(prediction.output)
        return [self._found[prediction.output] for prediction in self.predictions]

    @cached_property
    def longest(self) -> list[list[frozenset[str]]]:
        """The mentions of each answer that are not part of a longer one."""
        return [longest_mentions(found) for found in self.found]

    @cached_property
    def longest_candidates(self) -> list[list[frozenset[str]] | None]:
        """As `longest`, only for the candidates; None for an image without candidates."""
        result: list[list[frozenset[str]] | None] = []
        for prediction, found, longest in zip(self.predictions, self.found, self.longest, strict=True):
            if prediction.choices is None:
                result.append(None)
            elif len(prediction.choices) == len(self.first_index):
                result.append(longest)
            else:
                result.append(longest_mentions(found, prediction.choices))
        return result


def _budget_is_spent(prediction: Prediction) -> bool:
    """Whether an API ended an empty answer at the token limit: a reasoning model spent all tokens on its thought."""
    reply = prediction.reply
    return reply is not None and reply.finish == "length" and not prediction.output.strip()


def proportion(answers: Answers, hits: Sequence[Hit]) -> Interval:
    """The share of hits among the images that count, with its Wilson interval."""
    counted = [hit for hit in hits if hit is not None]
    return (sum(counted) / len(counted), *wilson_interval(sum(counted), len(counted)), len(counted))


def mean_over_classes(answers: Answers, hits: Sequence[Hit]) -> Interval:
    """The mean of the classes' accuracies."""
    counts = class_counts([prediction.class_index for prediction in answers.predictions], [bool(hit) for hit in hits])
    return (*mean_per_class(counts), len(hits))


@dataclass(frozen=True)
class Metric:
    """One metric: `hits` says of every answer whether it counts as a hit, `summary` turns hits into a number."""

    name: str
    definition: str  # an answer is a hit when ...
    hits: Callable[[Answers], Sequence[Hit]]
    applies: Callable[[Answers], bool] = lambda answers: answers.kind != "ranking"
    summary: Callable[[Answers, Sequence[Hit]], Interval] = proportion
    judges: bool = False  # it decides between right and wrong: the table of metrics compares it with the paper's


def composed(text: str) -> str:
    """A text in Unicode's composed form (NFC): an "é" may be one character or two."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def contains(prediction: Prediction) -> bool:
    """The lower-cased label is a substring of the lower-cased answer: the paper's metric (section 2).

    Identity by name: an answer "missile" is right for both of ImageNet's classes of that name.
    """
    return composed(prediction.label.lower()) in composed(prediction.output.lower())


def exact(prediction: Prediction) -> bool:
    """The answer is the label, letter case, outer white space and a final full stop aside. Identity by name."""
    return _stripped(prediction.output) == _stripped(prediction.label)


def _stripped(text: str) -> str:
    return composed(text).strip().removesuffix(".").strip().lower()


def _bare(label: str) -> str:
    return _stripped(label.replace("(", "").replace(")", ""))


def empty(prediction: Prediction) -> bool:
    """The answer is empty."""
    return not prediction.output.strip()


def _each(test: Callable[[Prediction], Hit]) -> Callable[[Answers], list[Hit]]:
    """Hits of a metric that looks at one answer at a time."""
    return lambda answers: [test(prediction) for prediction in answers.predictions]


def _right_by_class(answers: Answers) -> list[Hit]:
    """As the paper's metric, but a shared name stands for its first class: an answer in words cannot say which."""
    return [
        right and prediction.class_index == answers.first_index[prediction.label]
        for right, prediction in zip(answers.right, answers.predictions, strict=True)
    ]


def _contains_words(answers: Answers) -> list[Hit]:
    return [p.label in all_named(found) for p, found in zip(answers.predictions, answers.found, strict=True)]


def _unique(answers: Answers) -> list[Hit]:
    """Exactly one class is mentioned, however often, and it is the right one."""
    return [
        len(set(mentioned)) == 1 and prediction.label in mentioned[0]
        for prediction, mentioned in zip(answers.predictions, answers.longest, strict=True)
    ]


def _no_class(answers: Answers) -> list[Hit]:
    return [not mentioned for mentioned in answers.longest]


def _no_candidate(answers: Answers) -> list[Hit]:
    return [None if mentioned is None else not mentioned for mentioned in answers.longest_candidates]


def _several_candidates(answers: Answers) -> list[Hit]:
    return [None if mentioned is None else len(set(mentioned)) > 1 for mentioned in answers.longest_candidates]


def _echo(answers: Answers) -> list[Hit]:
    hits: list[Hit] = []
    for prediction, mentioned in zip(answers.predictions, answers.longest_candidates, strict=True):
        hits.append(None if mentioned is None else _repeats_list(mentioned, prediction.choices or ()))
    return hits


def _repeats_list(mentioned: Sequence[frozenset[str]], choices: Sequence[str]) -> bool:
    """Whether at least ECHO_LENGTH candidates (all, where there are fewer) follow each other as in the list."""
    enough = min(ECHO_LENGTH, len(choices))
    if len(mentioned) < enough:
        return False
    if len(mentioned) < SHORT_LIST:
        place_of = choices.index
    else:
        place_of = {name: place for place, name in enumerate(choices)}.__getitem__
    places = [min(place_of(name) for name in names) for names in mentioned]
    length = 1
    for before, after in zip(places, places[1:], strict=False):
        length = length + 1 if after == before + 1 else 1
        if length >= enough:
            return True
    return False


def _contains_synonym(answers: Answers) -> list[Hit]:
    """The paper's Table 8; the class's own name counts too."""
    lemmas = class_facts.lemmas()
    hits: list[Hit] = []
    for prediction in answers.predictions:
        output = prediction.output.lower()
        hits.append(contains(prediction) or any(lemma in output for lemma in lemmas[prediction.class_index]))
    return hits


def _real(answers: Answers) -> list[Hit]:
    """The paper's metric for any of the classes that people saw in the image; None where they agreed on none."""
    real, hits = class_facts.real_labels(), []
    for prediction in answers.predictions:
        classes = real.get(class_facts.validation_file(prediction.example_id)) or ()
        names = [answers.names[index].lower() for index in classes]
        if not names:
            hits.append(None)
        elif PAPER_METRIC[answers.kind] == "exact":
            hits.append(_stripped(prediction.output) in names)
        else:
            hits.append(any(name in prediction.output.lower() for name in names))
    return hits


def _make_model(prediction: Prediction) -> bool:
    name = plain_words(class_facts.without_year(prediction.label))
    return f" {name} " in f" {plain_words(prediction.output)} "


def _semantic(answers: Answers) -> list[Hit]:
    nearest = answers.encoder.nearest(answers.predictions, answers.names)
    return [name == prediction.label for prediction, name in zip(answers.predictions, nearest, strict=True)]


def _is_imagenet(answers: Answers) -> bool:
    return answers.kind != "ranking" and answers.names == class_facts.imagenet_names()


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "right by the paper's metric: `contains` for answers in words, the first class for CLIP and "
               "rankings", lambda answers: answers.right, lambda answers: True),
        Metric("top5", "the true name is among the first five of a ranking", lambda answers: answers.ranked_among_five,
               lambda answers: answers.ranked_among_five is not None),
        Metric("mean_per_class", "as `accuracy`; the mean over the classes", lambda answers: answers.right,
               summary=mean_over_classes),
        Metric("accuracy_by_class", "as `accuracy`, a shared name standing for its first class", _right_by_class,
               lambda answers: answers.has_shared_names),
        Metric("contains", "the lower-cased label is a substring of the lower-cased answer", _each(contains)),
        Metric("exact", "answer and label are equal, case, outer space and a final full stop aside", _each(exact),
               judges=True),
        Metric("exact_bare", "as `exact`, without ( and ) in the label, as the reference scores its BLIP-2",
               _each(lambda prediction: _stripped(prediction.output) == _bare(prediction.label)),
               lambda answers: answers.is_text and any("(" in name for name in answers.names), judges=True),
        Metric("empty", "the answer is empty", _each(empty), lambda answers: answers.kind in TEXT_KINDS),
        Metric("cut", "there is no answer: the thought of a thinking model was cut off at the token limit",
               lambda answers: answers.cut, lambda answers: any(answers.cut)),
        Metric("contains_words", "the label occurs in the answer as whole words, or in the simple plural",
               _contains_words, lambda answers: answers.is_text, judges=True),
        Metric("unique", "exactly one class is mentioned so, the right one", _unique, lambda answers: answers.is_text,
               judges=True),
        Metric("no_class", "no class is mentioned", _no_class, lambda answers: answers.is_text),
        Metric("refusal", "the API refused to answer",
               _each(lambda prediction: prediction.reply and prediction.reply.finish == "refusal"),
               lambda answers: answers.is_text),
        Metric("no_candidate", "no candidate is mentioned", _no_candidate,
               lambda answers: answers.is_text and answers.has_candidates),
        Metric("several_candidates", "several candidates are mentioned", _several_candidates,
               lambda answers: answers.is_text and answers.has_candidates),
        Metric("echo", "three or more candidates follow each other as in the list", _echo,
               lambda answers: answers.is_text and answers.has_candidates),
        Metric("contains_synonym", "the label or any WordNet lemma of its class is a substring", _contains_synonym,
               lambda answers: answers.is_text and _is_imagenet(answers), judges=True),
        Metric("real", "as `accuracy`, for any class that people saw in the image (ReaL labels)", _real, _is_imagenet,
               judges=True),
        Metric("make_model", "the label without its year occurs as whole words", _each(_make_model),
               lambda answers: answers.is_text and answers.names == class_facts.car_names(), judges=True),
        Metric("semantic", "the label's embedding is nearest to the answer's", _semantic,
               lambda answers: answers.is_text and answers.encoder is not None, judges=True),
    )
}  # fmt: skip


def metric_hits(answers: Answers) -> dict[str, Sequence[Hit]]:
    """The hits of every metric that applies and counts at least one image, "accuracy" first."""
    hits = {metric.name: metric.hits(answers) for metric in METRICS.values() if metric.applies(answers)}
    return {name: values for name, values in hits.items() if any(value is not None for value in values)}
