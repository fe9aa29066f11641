"""The metrics of the general benchmarks by their official definitions: VQA accuracy, POPE, ANLS, letters, a judge."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmclassifier.questions.items import LETTERS
from vlmclassifier.questions.parsing import parse_paper
from vlmclassifier.records import Prediction, Score, UserError
from vlmclassifier.scoring.questions import grouped_proportion
from vlmclassifier.scoring.statistics import Estimate
from vlmclassifier.thoughts import final_answer

RESAMPLES = 2_000
ANLS_THRESHOLD = 0.5
# The processing of the VQA evaluation (Antol et al., 2015), which TextVQA's evaluation uses.
ARTICLES = {"a", "an", "the"}
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
          "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
SHORTENED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'd've I'm
I've isn't it'd it'll let's ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
should've shouldn't somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
you'd you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in SHORTENED.split()}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
COMMA_BETWEEN_DIGITS = re.compile(r"(\d)(,)(\d)")


def normalised(answer: str) -> str:
    """An answer as TextVQA's evaluation compares it: lower case, no punctuation and articles, digits for numbers."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    source = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        is_beside_space = f"{mark} " in source or f" {mark}" in source
        text = text.replace(mark, "" if is_beside_space or COMMA_BETWEEN_DIGITS.search(source) else " ")
    words = []
    for word in PERIOD.sub("", text).split():
        word = DIGITS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """The mean over the annotators of min(1, matches among the others / 3)."""
    found, given = normalised(answer), [normalised(one) for one in answers]
    if len(given) == 1:
        return float(found == given[0])
    total = 0.0
    for left_out in range(len(given)):
        matches = sum(found == one for place, one in enumerate(given) if place != left_out)
        total += min(1.0, matches / 3)
    return total / len(given)


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer: no, if its first sentence has the word "no" or "not"; else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def anls(answer: str, answers: Sequence[str]) -> float:
    """DocVQA: 1 minus the normalised Levenshtein distance to the nearest answer; 0 above a distance of one half.

    At one half exactly its evaluation counts 0.5, the definition of ST-VQA 0.
    """
    from rapidfuzz.distance import Levenshtein

    def plain(text: str) -> str:
        return " ".join(text.strip().lower().split())

    best = 0.0
    for one in answers:
        distance = Levenshtein.normalized_distance(plain(one), plain(answer))
        best = max(best, 1 - distance if distance <= ANLS_THRESHOLD else 0.0)
    return best


def score_vqa(folder: Path, config: dict[str, Any], rows: Sequence[Prediction], common: tuple) -> list[Score]:
    """The scores of a run. `common`: model, setting, data set; `accuracy` is what the paper's table has."""
    metric, groups = config["metric"], [row.class_index for row in rows]
    answers = [final_answer(row.output, row.prompt)[0].strip() for row in rows]
    right = [json.loads(row.label) for row in rows]
    tags = tuple(config["tags"])
    if metric == "judge":
        values = read_judged(folder, rows)
        if values is None:
            return []
        judge = json.loads((folder / "judge.json").read_text(encoding="utf-8"))["model"]
        return [Score(*common, "accuracy", *mean(values, groups), (*tags, *([] if judge == PAPERS_JUDGE else [judge])))]
    if metric == "f1":
        return pope_scores([says_yes(answer) for answer in answers], [one[0] == "yes" for one in right], groups, common,
                           tags)  # fmt: skip
    pairs = list(zip(answers, right, strict=True))
    if metric == "letter":
        chosen = [parse_paper(answer, row.choices) for answer, row in zip(answers, rows, strict=True)]
        values = [float(place is not None and LETTERS[place] == one[0])
                  for place, one in zip(chosen, right, strict=True)]  # fmt: skip
    else:
        function = {"vqa_accuracy": vqa_accuracy, "anls": anls}[metric]
        values = [function(answer, one) for answer, one in pairs]
    return [Score(*common, "accuracy", *mean(values, groups), tags)]


PAPERS_JUDGE = "gpt-4-0613"


def pope_scores(
    said: Sequence[bool], true: Sequence[bool], groups: Sequence[int], common: tuple, tags: tuple[str, ...]
) -> list[Score]:  # fmt: skip
    """F1 ("accuracy", as in Table 13 and LLaVA's paper), plain accuracy, precision, recall and the share of yes."""
    import numpy as np

    counts = np.array([[s and t, s and not t, not s and t] for s, t in zip(said, true, strict=True)], dtype=float)
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((places.max() + 1, 3))
    np.add.at(sums, places, counts)
    draws = np.random.default_rng(0).multinomial(len(sums), [1 / len(sums)] * len(sums), size=RESAMPLES) @ sums

    def ratio(numerator: Any, denominator: Any) -> Any:
        return 100 * np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)

    forms = {
        "accuracy": lambda c: ratio(2 * c[..., 0], 2 * c[..., 0] + c[..., 1] + c[..., 2]),
        "precision": lambda c: ratio(c[..., 0], c[..., 0] + c[..., 1]),
        "recall": lambda c: ratio(c[..., 0], c[..., 0] + c[..., 2]),
    }
    scores = []
    for name, form in forms.items():
        low, high = np.percentile(form(draws), [2.5, 97.5])
        value = float(form(counts.sum(axis=0)[None])[0])
        scores.append(Score(*common, name, value, float(low), float(high), len(said), tags))
    hits = [a == b for a, b in zip(said, true, strict=True)]
    scores.append(Score(*common, "plain_accuracy", *grouped_proportion(hits, groups), tags))
    scores.append(Score(*common, "yes", *grouped_proportion(said, groups), tags))
    return scores


def mean(values: Sequence[float], groups: Sequence[int]) -> Estimate:
    """A mean of shares in percent with the interval of a bootstrap over images."""
    import numpy as np

    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(places, values), np.bincount(places)
    draws = np.random.default_rng(0).multinomial(len(sums), [1 / len(sums)] * len(sums), size=RESAMPLES)
    low, high = np.percentile(100 * (draws @ sums) / (draws @ sizes), [2.5, 97.5])
    return Estimate(100 * float(np.mean(values)), float(low), float(high), len(values))


# The prompt of MM-Vet's evaluation (Yu et al., 2024, Table 1), with all of its examples.
MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | The meme "
)
JUDGE_PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{MEME}talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and "
    "Greenland isn't very green. | 0.4\n"
    f"{MEME}is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its "
    "name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have "
    "trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor "
    "in this meme is derived from the unexpected contrast between the names of the countries and their actual physical "
    "characteristics. | 1.0\n"
    "{question} | {truth} | {prediction} | "
)


def parse_judged(text: str) -> float | None:
    """The score in a judge's answer: its first word, if that is a number from 0 to 1; else None."""
    words = text.split()
    if not words or not re.fullmatch(r"\d+(?:\.\d+)?", words[0]):
        return None
    value = float(words[0])
    return value if value <= 1 else None


def read_judged(folder: Path, rows: Sequence[Prediction]) -> list[float] | None:
    """The judge's scores in the order of the rows; None where some are missing. Raises UserError for another file."""
    file = folder / "judge.jsonl"
    if not file.exists():
        return None
    try:
        judged = {row["key"]: row["score"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no file of a judge: move it away and judge again.") from None
    if not all(row.example_id in judged for row in rows):
        return None
    return [judged[row.example_id] for row in rows]
