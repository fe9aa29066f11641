"""Every metric by name: an answer is right or wrong, or not counted."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vlmclassifier.records import Prediction
from vlmclassifier.scoring import special
from vlmclassifier.scoring.intervals import by_class, mean_per_class, wilson_interval
from vlmclassifier.scoring.mentions import Mentions, all_named, maximal, plain_words

if TYPE_CHECKING:
    from vlmclassifier.scoring.semantic import Encoder

# By model kind: what the paper calls accuracy.
PAPER_METRIC = {"vlm": "contains", "api": "contains", "clip": "exact", "ranking": "exact"}
FEW = 30  # mentions whose places are looked up in the list itself, which costs less than an index of it
ECHO = 3  # so many candidates one after the other, as the list has them, are an echo of it
Hit = bool | None  # None: this picture does not count


def contains(prediction: Prediction) -> bool:
    """The lower-cased label is a substring of the lower-cased answer: the paper's metric (section 1).

    Identity by name: an answer "missile" is right for both of ImageNet's classes of that name.
    """
    return prediction.label.lower() in prediction.output.lower()


def exact(prediction: Prediction) -> bool:
    """The answer is the label, letter case, outer white space and a final full stop aside. Identity by name."""
    return _bare(prediction.output) == _bare(prediction.label)


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").strip().lower()


def empty(prediction: Prediction) -> bool:
    """The model said nothing."""
    return not prediction.output.strip()


METRICS: dict[str, Callable[[Prediction], bool]] = {"contains": contains, "exact": exact, "empty": empty}


class Scorer:
    """All metrics for answers about one list of class names; `kind` is that of the model.

    `encoder`: adds "semantic" for answers in words.
    """

    def __init__(self, names: Sequence[str], kind: str, encoder: "Encoder | None" = None) -> None:
        self.names, self.kind, self.encoder = tuple(names), kind, encoder
        self.mentions = Mentions(names)
        self.first = {name: index for index, name in reversed(list(enumerate(names)))}
        self.right = METRICS[PAPER_METRIC[kind]]
        self._found: dict[str, list] = {}  # answers repeat

    def hits(self, predictions: Sequence[Prediction]) -> dict[str, list[Hit]]:
        """Of each metric that applies here whether each answer is right by it, "accuracy" (the paper's) first."""
        hits: dict[str, list[Hit]] = {"accuracy": [self.right(p) for p in predictions]}
        if len(self.first) < len(self.names):
            pairs = zip(hits["accuracy"], predictions, strict=True)
            hits["accuracy_by_class"] = [hit and p.class_index == self.first[p.label] for hit, p in pairs]
        for name, metric in METRICS.items():
            hits[name] = hits["accuracy"] if metric is self.right else [metric(p) for p in predictions]
        if self.kind in ("vlm", "api"):
            hits |= self._of_text(predictions)
        if self.names == special.imagenet_names():
            hits |= self._of_imagenet(predictions, hits["contains"])
        if self.names == special.car_names() and self.kind in ("vlm", "api"):
            hits["make_model"] = [self._make_model(p) for p in predictions]
        if self.encoder and self.kind in ("vlm", "api"):
            nearest = self.encoder.nearest(predictions, self.names)
            hits["semantic"] = [name == p.label for p, name in zip(predictions, nearest, strict=True)]
        return {name: values for name, values in hits.items() if any(value is not None for value in values)}

    def _of_text(self, predictions: Sequence[Prediction]) -> dict[str, list[Hit]]:
        found = [self._find(p.output) for p in predictions]
        tops = [maximal(one) for one in found]
        hits: dict[str, list[Hit]] = {
            "contains_words": [p.label in all_named(one) for p, one in zip(predictions, found, strict=True)],
            "unique": [_only(top, p.label) for p, top in zip(predictions, tops, strict=True)],
            "no_class": [not top for top in tops],
            "refusal": [p.reply and p.reply.finish == "refusal" for p in predictions],
        }
        listed = [None if p.choices is None else top if len(p.choices) == len(self.first) else maximal(one, p.choices)
                  for p, one, top in zip(predictions, found, tops, strict=True)]  # fmt: skip
        hits["no_candidate"] = [None if top is None else not top for top in listed]
        hits["several_candidates"] = [None if top is None else len(set(top)) > 1 for top in listed]
        hits["echo"] = [None if top is None else _echoes(top, p.choices or ())
                        for p, top in zip(predictions, listed, strict=True)]  # fmt: skip
        return hits

    def _of_imagenet(self, predictions: Sequence[Prediction], contained: Sequence[Hit]) -> dict[str, list[Hit]]:
        lemmas, real = special.lemmas(), special.real_labels()
        hits: dict[str, list[Hit]] = {"real": []}
        if self.kind in ("vlm", "api"):  # Table 8; the class's own name counts too
            hits["contains_synonym"] = [
                right or any(lemma in p.output.lower() for lemma in lemmas[p.class_index])
                for right, p in zip(contained, predictions, strict=True)
            ]
        for p in predictions:
            classes = real.get(special.validation_file(p.example_id))
            answer = (_bare if PAPER_METRIC[self.kind] == "exact" else str.lower)(p.output)
            names = [self.names[index].lower() for index in classes or ()]
            by_name = answer.__eq__ if PAPER_METRIC[self.kind] == "exact" else answer.__contains__
            hits["real"].append(any(map(by_name, names)) if names else None)
        return hits

    def _make_model(self, prediction: Prediction) -> bool:
        name = plain_words(special.without_year(prediction.label))
        return f" {name} " in f" {plain_words(prediction.output)} "

    def _find(self, output: str) -> list:
        if output not in self._found:
            self._found[output] = self.mentions.find(output)
        return self._found[output]


def _only(top: Sequence[frozenset[str]], label: str) -> bool:
    """Whether exactly one class is mentioned, however often, and it is the right one."""
    return len(set(top)) == 1 and label in top[0]


def _echoes(top: Sequence[frozenset[str]], choices: Sequence[str]) -> bool:
    """Whether at least ECHO candidates (all, of fewer) follow each other as in the list."""
    run, enough = 1, min(ECHO, len(choices))
    if len(top) < enough:
        return False
    place = choices.index if len(top) < FEW else {name: number for number, name in enumerate(choices)}.__getitem__
    places = [min(map(place, names)) for names in top]
    for before, after in zip(places, places[1:], strict=False):
        run = run + 1 if after == before + 1 else 1
        if run >= enough:
            return True
    return False


def score_predictions(
    predictions: Sequence[Prediction], names: Sequence[str], kind: str
) -> list[tuple[str, float, float, float, int]]:
    """Rows (metric, value, low, high, n) in percent for one run: "accuracy" is the paper's metric for this kind.

    Where two classes share a name, the accuracy is given by class index too ("accuracy_by_class"): a shared name then
    stands for the first class that bears it, since an answer in words cannot say which one it means.
    """
    return summarise(predictions, Scorer(names, kind).hits(predictions))


def summarise(
    predictions: Sequence[Prediction], hits: Mapping[str, Sequence[Hit]]
) -> list[tuple[str, float, float, float, int]]:
    """Rows (metric, value, low, high, n) in percent of what `Scorer.hits` found, with the mean over classes."""
    rows = [row for metric, values in hits.items() if (row := _row(metric, values))]
    accuracy = mean_per_class(by_class(predictions, hits["accuracy"]))
    rows.insert(1, ("mean_per_class", *(100 * value for value in accuracy), len(predictions)))
    return rows


def _row(metric: str, values: Sequence[Hit]) -> tuple[str, float, float, float, int]:
    counted = [value for value in values if value is not None]
    low, high = wilson_interval(sum(counted), len(counted))
    return metric, 100 * sum(counted) / len(counted), 100 * low, 100 * high, len(counted)
