"""Protects: ImageWikiQA's questions are read, asked and parsed as the paper does, and its statistics are right."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from conftest import script

from vlmclassifier.questions.building import audit
from vlmclassifier.questions.items import make_question, question_text, read_questions, with_name
from vlmclassifier.questions.parsing import contains_option, parse_paper, parse_strict, random_option
from vlmclassifier.questions.settings import QuestionSetting
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.scoring.questions import (
    CAUSES,
    Answers,
    error_causes,
    grouped_difference,
    grouped_proportion,
    paired_tests,
)

OPTIONS = ("a red rose", "a blue tulip", "an oak", "grass")


def test_the_released_file_loads_whole(labels):
    questions = read_questions(labels / "imagewikiqa.jsonl")
    checks = audit(questions)
    assert len(questions) == 2_000 and checks["images"] == 1_961 and checks["different questions"] == 752
    assert checks["most frequent letter"] == 26.3 and checks["random"] == 25.0  # the paper says 25.9
    lines = (labels / "imagewikiqa.jsonl").read_text(encoding="utf-8").splitlines()
    assert [question.text for question in questions] == [json.loads(line)["text"] for line in lines]
    named = [with_name(question.text, "newt") for question in questions]
    assert not any(re.search(r"\b(this|these) objects?\b", text, re.IGNORECASE) for text in named)
    assert sum("newts" in text.lower() for text in named) >= 14
    assert len({question.id for question in questions}) == 2_000


def test_the_audit_is_printed(labels, capsys):
    module = script("imagewikiqa/build_questions.py")
    module.main(module.Args(audit=labels / "imagewikiqa.jsonl"))
    assert "longest option: 41.7" in capsys.readouterr().out


def test_names_take_the_place_of_the_object():
    text = "This object, or these objects: what is this object's coat?"
    assert with_name(text, "red fox") == "Red fox, or red foxs: what is red fox's coat?"
    assert with_name("Who made the object?", "x") == "Who made the object?"


def restated(answer, options):
    """The paper's rule (experiments.md, section 6), once more."""
    letters, answer = "ABCD"[: len(options)], answer.strip()
    while answer and answer[0] in ",.!?;:'":
        answer = answer[1:]
    while answer and answer[-1] in ",.!?;:'":
        answer = answer[:-1]
    answer = f" {answer} "
    candidates = [
        (answer.rfind(f"({letter})"), place) for place, letter in enumerate(letters) if f"({letter})" in answer
    ]
    if not candidates:
        candidates = [(answer.rfind(f" {one} "), place) for place, one in enumerate(letters) if f" {one} " in answer]
    if not candidates and len(answer.split()) > 5:
        candidates = [(answer.lower().rfind(option.lower()), place) for place, option in enumerate(options)
                      if option.lower() in answer.lower()]  # fmt: skip
    return max(candidates)[1] if candidates else None


def answers_of_all_shapes():
    rng = random.Random(0)
    parts = ["A", "B.", "(C)", "D)", "the answer is", "The answer is (B).", "a red rose", "grass", "an oak", "I think",
             "because of", "it is", "A rose", "not", "Answer: D", "(A) or (B)", ",", "!", "\n", "option"]  # fmt: skip
    return ["", " . "] + [" ".join(rng.choices(parts, k=rng.randint(1, 7))) for _ in range(198)]


def test_the_papers_parser_equals_its_restatement():
    answers = answers_of_all_shapes()
    assert len(answers) == 200
    found = [parse_paper(answer, OPTIONS) for answer in answers]
    assert found == [restated(answer, OPTIONS) for answer in answers]
    assert set(found) == {None, 0, 1, 2, 3}
    rows = [row(answer, "A", number) for number, answer in enumerate(answers)]
    metrics = Answers(rows, "letters").metrics()
    strict = [parse_strict(answer, OPTIONS) for answer in answers]
    disagree = sum(a is not None and b is not None and a != b for a, b in zip(found, strict, strict=True))
    assert sum(metrics["rules_disagree"]) == disagree > 0
    assert sum(metrics["failures"]) == found.count(None) and sum(metrics["strict_failures"]) == strict.count(None)
    assert sum(metrics["accuracy_failures_wrong"]) == found.count(0) <= sum(metrics["accuracy"])


@pytest.mark.parametrize(
    ("answer", "strict"),
    [
        ("B", 1), ("(B)", 1), ("B. a blue tulip", 1), ("B) because", 1), ("The answer is D.", 3), ("Answer: (C)", 2),
        ("an oak", 2), ("An oak.", 2), ("A rose", None), ("A a red rose", 0), ("A or B", None), ("I do not know", None),
        ("The answer is A, no, the answer is B", None), ("", None), ("E", None), ("grass", 3),
    ],
)  # fmt: skip
def test_the_strict_rule(answer, strict):
    assert parse_strict(answer, OPTIONS) == strict


def test_free_answers_and_guesses():
    assert contains_option("It is an oak.", OPTIONS, 2) and not contains_option("an oak or grass", OPTIONS, 2)
    assert contains_option("16 sides", ("6", "16"), 1) and not contains_option("16", ("6", "16"), 0)
    assert contains_option("an open curve", ("open", "an open curve"), 1)
    guesses = Counter(random_option(0, str(number), 4) for number in range(4_000))
    assert set(guesses) == {0, 1, 2, 3} and max(guesses.values()) < 1_100
    assert random_option(0, "x", 4) == random_option(0, "x", 4)


def row(output, label, number, group=0, ranking=None, options=OPTIONS):
    return Prediction(str(number), label, group, "prompt", options, output, ranking)


def test_groups_widen_the_interval_and_lower_the_power():
    """Rows that change together within groups: McNemar over rows says what the test over groups does not."""
    rng = np.random.default_rng(1)
    groups = [number // 20 for number in range(200)]
    up = rng.integers(0, 2, size=10)
    first, second = [bool(up[group]) for group in groups], [False] * 200
    test = paired_tests(first, second, groups)
    assert test.mcnemar < 1e-6 and test.sign_flip > 0.001
    wide, narrow = grouped_difference(first, second, groups), grouped_difference(first, second, list(range(200)))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low) and wide.value == narrow.value == 10 * up.sum()
    flat = grouped_proportion([True] * 200, groups)
    assert flat.value == 100 and flat.low < 80 and flat.high == pytest.approx(100)
    assert paired_tests(first, first, groups).sign_flip == 1


def test_sign_flips_equal_an_enumeration():
    sums = [3, 1, -1, 2, 2]
    first = [value > 0 for value in sums for _ in range(abs(value))]
    second = [not hit for hit in first]
    groups = [number for number, value in enumerate(sums) for _ in range(abs(value))]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    exact = (np.abs(np.array(sums) @ signs) >= abs(sum(sums))).mean()
    assert paired_tests(first, second, groups).sign_flip == pytest.approx(exact, abs=0.01)


def test_causes_sum_to_the_errors():
    rng = random.Random(0)
    keys = [str(number) for number in range(300)]
    draw = lambda share: {key: rng.random() < share for key in keys}  # noqa: E731
    right, own, true_name, by_own = draw(0.5), draw(0.3), draw(0.6), draw(0.4)
    counts = error_causes(right, own, true_name, by_own)
    assert sum(counts[cause] for cause in CAUSES) == counts["errors"] == sum(not hit for hit in right.values())
    assert counts["joining"] == sum(not right[k] and own[k] and true_name[k] for k in keys)
    assert counts["recognition"] == sum(not right[k] and not own[k] and true_name[k] for k in keys)
    assert counts["knowledge"] == sum(not right[k] and not true_name[k] for k in keys)
    assert counts["lucky"] == sum(right[k] and not own[k] and not by_own[k] for k in keys)


def test_settings_have_the_papers_names():
    assert (
        QuestionSetting().name == "multiple_choice" and QuestionSetting(thought=False).name == "multiple_choice-direct"
    )
    assert QuestionSetting("free", "text+own").name == "free_answer-text_only-own_name"
    question = make_question("1.png", "What is this object made of?", OPTIONS, 1, "vase")
    assert QuestionSetting("free", "image+name").shown(question) == "What is vase made of?"
    assert QuestionSetting().shown(question) == question_text("What is this object made of?", OPTIONS)
    assert QuestionSetting("rank_options").candidates(question) == list(OPTIONS)
    assert QuestionSetting("rank_letters").candidates(question) == ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "1.png", "text": "Q?\\nA. x\\nB. y\\nChoose A or B.", "label": "C", "classname": "x"}',
         "row 2: the label 'C' is none of its options, A, B"),
        ('{"image": "1.png", "text": "Q?\\nA. x\\nB. y", "label": "AB", "classname": "x"}',
         "the label 'AB' is none of"),
        ('{"image": "1.png", "text": "Q?\\nA. x\\nB. y\\nD. z", "label": "A", "classname": "x"}',
         "letters must be in order"),
        ('{"image": "1.png", "text": "Q?", "label": "A", "classname": "x"}', "row 2: the text has no question with"),
        ('{"image": "1.png", "text": "Q?\\nA. x\\nB. y", "label": "A"}', "row 2 is no question"),
        ('{"image": 3, "text": "Q?\\nA. x\\nB. y", "label": "A", "classname": "x"}', "row 2: image, text, label and"),
        ('{"image": "0.png", "text": "Q?\\nA. x\\nB. y\\nChoose A or B.", "label": "B", "classname": "x"}',
         "are the same question about one image"),
        ("not JSON", "row 2 is no question"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(line, message, tmp_path):
    good = {"image": "0.png", "text": "Q?\nA. x\nB. y\nChoose A or B.", "label": "A", "classname": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.jsonl")
