"""Protects: class frequencies are exact, texts are true and reproducible, candidate lists are as in the evaluation."""

import json
import random
import re

import pytest

from vlmclassifier.mini.corpus import (
    CorpusSpec,
    assign_labels,
    candidate_list_question,
    chat_prompt,
    class_list_spec,
    frequency_ranks,
    image_text,
    language_text,
    llava_items,
    multiple_choice,
    naming_shares,
    plane_figures_spec,
)
from vlmclassifier.plane_figures.facts import figure_facts
from vlmclassifier.prompts import WORDINGS, PromptSetting
from vlmclassifier.records import Example, UserError

CORPUS = plane_figures_spec()
ZIPF = {"head": 12 / 96, "exponent": 1.2, "never": 15 / 96}


def examples(count: int) -> list[Example]:
    return [Example(f"{name}/{i}", "", name, 0, "train") for name in CORPUS.names for i in range(count)]


@pytest.mark.parametrize("frequency", ["zipf", "permuted", "uniform"])
def test_exactly_the_given_share_of_images_is_named(frequency):
    shares = naming_shares(CORPUS.names, frequency, seed=5, **ZIPF)
    rows = examples(30)
    assignment = assign_labels(rows, shares, keep_generic=0.5, seed=5)
    by_id = {example.id: example for example in rows}
    for name in CORPUS.names:
        assert len(assignment.named[name]) == round(30 * shares[name])
        assert len(assignment.generic[name]) == round(0.5 * (30 - len(assignment.named[name])))
        assert not set(assignment.named[name]) & set(assignment.generic[name])
        for image in assignment.generic[name]:  # no text of an unnamed image names its class
            for epoch in range(3):
                text = image_text(by_id[image], CORPUS, False, 5, epoch)
                assert name not in text.prompt + text.answer, text
    named = {image for ids in assignment.named.values() for image in ids}
    texts = [image_text(by_id[image], CORPUS, True, 5, epoch) for image in named for epoch in range(12)]
    assert {text.image for text in texts if by_id[text.image].label in text.answer} == named


def test_zipf_always_names_the_head_and_never_the_tail():
    shares, ranks = naming_shares(CORPUS.names, "zipf", 0, **ZIPF), frequency_ranks(CORPUS.names, 0)
    by_rank = [shares[name] for name in sorted(shares, key=ranks.get)]
    assert by_rank[:12] == [1.0] * 12 and by_rank[-15:] == [0.0] * 15
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[23] == pytest.approx(0.5**1.2)
    assert frequency_ranks(CORPUS.names, 0) != frequency_ranks(CORPUS.names, 1)


def test_permuting_moves_every_class_to_another_third():
    before, after = frequency_ranks(CORPUS.names, 3), frequency_ranks(CORPUS.names, 3, permuted=True)
    third = len(CORPUS.names) // 3
    assert all(before[name] // third != after[name] // third for name in CORPUS.names)
    assert sorted(after.values()) == sorted(before.values())


def test_a_table_of_shares(tmp_path):
    file = tmp_path / "shares.json"
    file.write_text(json.dumps({name: 0.25 for name in CORPUS.names}))
    assert set(naming_shares(CORPUS.names, str(file), 0, **ZIPF).values()) == {0.25}
    file.write_text(json.dumps({"circle": 0.25}))
    with pytest.raises(UserError, match="neither zipf, permuted, uniform nor a table of shares .*every class"):
        naming_shares(CORPUS.names, str(file), 0, **ZIPF)
    with pytest.raises(UserError, match="No such file"):
        naming_shares(CORPUS.names, "zipff", 0, **ZIPF)


def test_texts_depend_only_on_seed_and_number_or_image():
    forward = [language_text(number, CORPUS, 1) for number in range(50)]
    random.seed(99)
    assert [language_text(number, CORPUS, 1) for number in reversed(range(50))][::-1] == forward
    assert [language_text(number, CORPUS, 2) for number in range(50)] != forward
    example = examples(1)[7]
    assert image_text(example, CORPUS, True, 0, 4) == image_text(example, CORPUS, True, 0, 4)
    assert len({image_text(example, CORPUS, True, 0, epoch).answer for epoch in range(30)}) > 3


def test_the_first_stage_has_only_captions():
    example = examples(1)[0]
    answers = {image_text(example, CORPUS, True, 0, epoch, caption=True).answer for epoch in range(20)}
    assert answers == {"a photo of an equilateral triangle"}


def test_candidate_list_questions_are_those_of_the_evaluation():
    question = candidate_list_question("astroid", CORPUS, 5, "key")
    example = Example("key", "", "astroid", 0, "train")
    wordings = {PromptSetting(CORPUS.names, "5", wording=wording).question(example).text for wording in WORDINGS}
    assert question in wordings and re.search(r'["\s]astroid[",]', question)
    assert chat_prompt("Why?", image=True) == "USER: <image>\nWhy?\nASSISTANT:"
    assert chat_prompt("Why?", image=False) == "USER: Why?\nASSISTANT:"


def test_the_letter_of_a_multiple_choice_question_is_the_true_answer():
    rng, letters = random.Random(0), set()
    for name in CORPUS.names:
        for fact in CORPUS.multiple_choice_facts(name):
            question, letter = multiple_choice(fact, f"the {name}", CORPUS, rng)
            options = dict(line.split(". ", 1) for line in question.splitlines()[1:-1])
            assert options[letter] == fact.answer and len(set(options.values())) == len(options)
            letters.add(letter)
    assert letters == set("ABCD")


def test_every_question_of_the_corpus_is_a_fact_of_the_table():
    true = {(fact.question.format(subject=f"the {name}"), fact.answer)
            for name, facts in figure_facts().items() for fact in facts}  # fmt: skip
    texts = [language_text(number, CORPUS, 0) for number in range(400)]
    questions = [(t.prompt[6:-11], t.answer) for t in texts if t.prompt and "Choose" not in t.prompt]
    assert len(questions) > 100 and set(questions) <= true


def test_a_class_list_without_facts_and_one_with_a_facts_file(tmp_path):
    without_facts = class_list_spec(["cat", "dog"])
    assert {language_text(number, without_facts, 0).answer for number in range(40)} <= {
        "cat", "dog", "a photo of a cat", "a photo of a dog",
    }  # fmt: skip
    file = tmp_path / "facts.json"
    file.write_text('{"cat": [["Does {subject} bark?", "no"]]}')
    with_facts = class_list_spec(["cat", "dog"], file)
    assert any(language_text(n, with_facts, 0).prompt == "USER: Does the cat bark?\nASSISTANT:" for n in range(60))
    for text, message in (
        ('{"cow": []}', "names 'cow'"),
        ('{"cat": [["Why?", "no"]]}', "without .subject."),
        ("[", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            class_list_spec(["cat", "dog"], file)


def test_llava_format():
    text = image_text(examples(1)[0], CORPUS, True, 0, 0, caption=True)
    (item,) = llava_items([text])
    human, gpt = item["conversations"]
    assert item["image"] == text.image and human["value"].startswith("<image>\n") and human["from"] == "human"
    assert gpt == {"from": "gpt", "value": "a photo of an equilateral triangle"}
    assert isinstance(CORPUS, CorpusSpec)
