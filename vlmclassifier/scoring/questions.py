"""Which option every answer of a run chooses, the run's scores, and comparisons of runs over different questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from vlmclassifier.questions.items import LETTERS
from vlmclassifier.questions.parsing import contains_option, parse_paper, parse_strict, random_option
from vlmclassifier.records import Prediction
from vlmclassifier.scoring.intervals import wilson_interval
from vlmclassifier.scoring.metrics import contains
from vlmclassifier.scoring.statistics import Estimate
from vlmclassifier.thoughts import final_answer

RESAMPLES, FLIPS = 2_000, 20_000
GUESS_SEED = 0


@dataclass(frozen=True)
class Answers:
    """The answers of one run. A row's `choices` are the options, its `label` the right letter, `class_index` the group.

    Groups are different questions, or classes: rows of one group are not independent of one another.
    """

    rows: Sequence[Prediction]
    form: str  # of questions.settings.FORMS

    @cached_property
    def chosen(self) -> list[int | None]:
        """The option that each answer chooses, by the paper's rule where it is in words; None where it finds none."""
        if self.form.startswith("rank_"):
            return [row.ranking[0] for row in self.rows]
        return [parse_paper(text, row.choices) for text, row in zip(self.texts, self.rows, strict=True)]

    @cached_property
    def texts(self) -> list[str]:
        """The answers, of a thinking model without the thought."""
        return [final_answer(row.output, row.prompt)[0] for row in self.rows]

    @cached_property
    def right(self) -> list[bool]:
        """Whether each answer is right; a multiple-choice answer without a letter is a random guess (as the paper)."""
        if self.form == "naming":
            return [contains(replace(row, output=text)) for row, text in zip(self.rows, self.texts, strict=True)]
        places = [LETTERS.index(row.label) for row in self.rows]
        if self.form == "free":
            return [contains_option(text, row.choices, place)
                    for text, row, place in zip(self.texts, self.rows, places, strict=True)]  # fmt: skip
        found = []
        for row, chosen, place in zip(self.rows, self.chosen, places, strict=True):
            guess = random_option(GUESS_SEED, row.example_id, len(row.choices)) if chosen is None else chosen
            found.append(guess == place)
        return found

    @property
    def groups(self) -> list[int]:
        """The group of each row."""
        return [row.class_index for row in self.rows]

    def metrics(self) -> dict[str, list[bool]]:
        """Metric -> hits: accuracy; of multiple-choice answers also those that the rules could not read."""
        found = {"accuracy": self.right}
        if self.form != "letters":
            return found
        strict = [parse_strict(text, row.choices) for text, row in zip(self.texts, self.rows, strict=True)]
        places = [LETTERS.index(row.label) for row in self.rows]
        return found | {
            "failures": [chosen is None for chosen in self.chosen],
            "accuracy_failures_wrong": [chosen == place for chosen, place in zip(self.chosen, places, strict=True)],
            "strict": [chosen == place for chosen, place in zip(strict, places, strict=True)],
            "strict_failures": [chosen is None for chosen in strict],
            "rules_disagree": [
                one is not None and other is not None and one != other
                for one, other in zip(self.chosen, strict, strict=True)
            ],
        }


def grouped_proportion(hits: Sequence[bool], groups: Sequence[int]) -> Estimate:
    """A share in percent with the interval of a bootstrap over groups; of 0 and 100 percent Wilson's of the groups."""
    if len(set(hits)) == 1:  # a bootstrap never draws what did not occur
        count = len(set(groups))
        low, high = wilson_interval(count * hits[0], count)
        return Estimate(100.0 * hits[0], 100 * low, 100 * high, len(hits))
    return grouped_difference(hits, [False] * len(hits), groups)


def grouped_difference(first: Sequence[bool], second: Sequence[bool], groups: Sequence[int]) -> Estimate:
    """The share of `first` minus that of `second` on the same rows, in points, by a bootstrap over groups."""
    import numpy as np

    sums, sizes = _group_sums(first, second, groups)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(sums), [1 / len(sums)] * len(sums), size=RESAMPLES)  # [draws, groups]
    low, high = np.percentile(100 * (draws @ sums) / (draws @ sizes), [2.5, 97.5])
    return Estimate(100 * sums.sum() / sizes.sum(), float(low), float(high), int(sizes.sum()))


class Test(NamedTuple):
    """The p-values of a paired difference."""

    sign_flip: float  # over groups: the verdict
    mcnemar: float  # over rows, whose size is wrong where rows of a group change together


def paired_tests(first: Sequence[bool], second: Sequence[bool], groups: Sequence[int]) -> Test:
    """Two-sided tests of no difference between two runs on the same rows.

    Sign flips: the sums of the differences of the groups get random signs; exact up to FLIPS draws.
    """
    import numpy as np
    from statsmodels.stats.contingency_tables import mcnemar

    sums, _ = _group_sums(first, second, groups)
    signs = np.random.default_rng(0).integers(0, 2, size=(FLIPS, len(sums)), dtype=np.int8) * 2 - 1
    extreme = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
    pairs = list(zip(first, second, strict=True))
    table = [[sum(a == x and b == y for a, b in pairs) for y in (True, False)] for x in (True, False)]
    return Test((1 + int(extreme.sum())) / (1 + FLIPS), float(mcnemar(table, exact=True).pvalue))


def _group_sums(first: Sequence[bool], second: Sequence[bool], groups: Sequence[int]) -> tuple[Any, Any]:
    """Sums of the differences and numbers of rows, by group."""
    import numpy as np

    _, places = np.unique(np.asarray(groups), return_inverse=True)
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    return np.bincount(places, difference), np.bincount(places).astype(float)


CAUSES = ("recognition", "knowledge", "joining")


def error_causes(
    right: Mapping[str, bool], own_name: Mapping[str, bool], true_name: Mapping[str, bool], by_own: Mapping[str, bool]
) -> dict[str, int]:
    """What a model's errors are made of; all mappings are from question ids. The three causes sum to the errors.

    `right`: the answer with the image; `own_name`: whether the model names the image rightly; `true_name`, `by_own`:
    whether its answer to the text alone is right with the true name, and with its own name, in place of "this object".
    Of an error: knowledge, where the text with the true name is wrong; else recognition, where its own name is wrong;
    else joining: it knows the name and the answer. Lucky: right answers with a wrong name of its own and a wrong answer
    to the text with that name; `own_name_repeats`: errors of recognition that the text with its own name has too.
    """
    counts = dict.fromkeys((*CAUSES, "errors", "right", "lucky", "own_name_repeats"), 0)
    for question, is_right in right.items():
        if is_right:
            counts["right"] += 1
            counts["lucky"] += not own_name[question] and not by_own[question]
            continue
        counts["errors"] += 1
        if not true_name[question]:
            counts["knowledge"] += 1
        elif not own_name[question]:
            counts["recognition"] += 1
            counts["own_name_repeats"] += not by_own[question]
        else:
            counts["joining"] += 1
    return counts
