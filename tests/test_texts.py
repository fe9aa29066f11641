"""Protects: class frequencies are met exactly, texts are true and keyed, and the closed world is asked as evaluated."""

import json
import random
import re

import pytest

from vlmclassifier.plane_figures.facts import figure_facts
from vlmclassifier.plane_figures.texts import (
    World,
    assign_naming,
    dialogue,
    frequency_ranks,
    language_text,
    list_question,
    llava_items,
    multiple_choice,
    naming_shares,
    picture_text,
    plane_figures_world,
    world_of,
)
from vlmclassifier.prompts import build_question
from vlmclassifier.records import Example, UserError

WORLD = plane_figures_world()
ZIPF = {"head": 12 / 96, "exponent": 1.2, "never": 15 / 96}


def examples(count: int) -> list[Example]:
    return [Example(f"{name}/{i}", "", "", name, 0, "train") for name in WORLD.names for i in range(count)]


@pytest.mark.parametrize("frequency", ["zipf", "permuted", "uniform"])
def test_exactly_so_many_pictures_are_named_as_the_table_says(frequency):
    shares = naming_shares(WORLD.names, frequency, seed=5, **ZIPF)
    rows = examples(30)
    naming = assign_naming(rows, shares, keep_generic=0.5, seed=5)
    by_id = {example.id: example for example in rows}
    for name in WORLD.names:
        assert len(naming.named[name]) == round(30 * shares[name])
        assert len(naming.generic[name]) == round(0.5 * (30 - len(naming.named[name])))
        assert not set(naming.named[name]) & set(naming.generic[name])
        for image in naming.generic[name]:  # what is not named is not named in any text
            for epoch in range(3):
                text = picture_text(by_id[image], WORLD, False, 5, epoch)
                assert name not in text.prompt + text.answer, text
    said = {image for ids in naming.named.values() for image in ids}
    texts = [picture_text(by_id[image], WORLD, True, 5, epoch) for image in said for epoch in range(12)]
    naming_texts = {text.image for text in texts if by_id[text.image].label in text.answer}
    assert naming_texts == said


def test_zipf_names_the_head_always_and_the_tail_never():
    shares, ranks = naming_shares(WORLD.names, "zipf", 0, **ZIPF), frequency_ranks(WORLD.names, 0)
    by_rank = [shares[name] for name in sorted(shares, key=ranks.get)]
    assert by_rank[:12] == [1.0] * 12 and by_rank[-15:] == [0.0] * 15
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[23] == pytest.approx(0.5**1.2)
    assert frequency_ranks(WORLD.names, 0) != frequency_ranks(WORLD.names, 1)


def test_permuting_moves_every_class_to_another_third():
    before, after = frequency_ranks(WORLD.names, 3), frequency_ranks(WORLD.names, 3, permuted=True)
    third = len(WORLD.names) // 3
    assert all(before[name] // third != after[name] // third for name in WORLD.names)
    assert sorted(after.values()) == sorted(before.values())


def test_a_table_of_shares(tmp_path):
    file = tmp_path / "shares.json"
    file.write_text(json.dumps({name: 0.25 for name in WORLD.names}))
    assert set(naming_shares(WORLD.names, str(file), 0, **ZIPF).values()) == {0.25}
    file.write_text(json.dumps({"circle": 0.25}))
    with pytest.raises(UserError, match="neither zipf, permuted, uniform nor a table of shares .*every class"):
        naming_shares(WORLD.names, str(file), 0, **ZIPF)
    with pytest.raises(UserError, match="No such file"):
        naming_shares(WORLD.names, "zipff", 0, **ZIPF)


def test_texts_depend_on_seed_and_number_or_picture_alone():
    forward = [language_text(number, WORLD, 1) for number in range(50)]
    random.seed(99)
    assert [language_text(number, WORLD, 1) for number in reversed(range(50))][::-1] == forward
    assert [language_text(number, WORLD, 2) for number in range(50)] != forward
    example = examples(1)[7]
    assert picture_text(example, WORLD, True, 0, 4) == picture_text(example, WORLD, True, 0, 4)
    assert len({picture_text(example, WORLD, True, 0, epoch).answer for epoch in range(30)}) > 3


def test_captions_only_in_the_first_stage():
    example = examples(1)[0]
    answers = {picture_text(example, WORLD, True, 0, epoch, caption=True).answer for epoch in range(20)}
    assert answers == {"a photo of an equilateral triangle"}


def test_lists_are_asked_as_the_evaluation_asks_them():
    question = list_question("astroid", WORLD, 5, "key")
    wordings = {build_question(Example("key", "", "", "astroid", 0, "train"), WORLD.names, 5, wording).text
                for wording in ("base", "alternative_1", "alternative_2", "alternative_3")}  # fmt: skip
    assert question in wordings and re.search(r'["\s]astroid[",]', question)
    assert dialogue("Why?", image=True) == "USER: <image>\nWhy?\nASSISTANT:"
    assert dialogue("Why?", image=False) == "USER: Why?\nASSISTANT:"


def test_the_letter_of_a_multiple_choice_is_the_true_answer():
    rng, letters = random.Random(0), set()
    for name in WORLD.names:
        for fact in WORLD.choosable(name):
            question, letter = multiple_choice(fact, f"the {name}", WORLD, rng)
            options = dict(line.split(". ", 1) for line in question.splitlines()[1:-1])
            assert options[letter] == fact.answer and len(set(options.values())) == len(options)
            letters.add(letter)
    assert letters == set("ABCD")


def test_every_text_of_the_corpus_is_a_fact_of_the_table():
    true = {(fact.question.format(subject=f"the {name}"), fact.answer)
            for name, facts in figure_facts().items() for fact in facts}  # fmt: skip
    asked = [language_text(number, WORLD, 0) for number in range(400)]
    questions = [(t.prompt[6:-11], t.answer) for t in asked if t.prompt and "Choose" not in t.prompt]
    assert len(questions) > 100 and set(questions) <= true


def test_a_world_without_facts_and_one_with_a_facts_file(tmp_path):
    bare = world_of(["cat", "dog"])
    assert {language_text(number, bare, 0).answer for number in range(40)} <= {
        "cat", "dog", "a photo of a cat", "a photo of a dog",
    }  # fmt: skip
    file = tmp_path / "facts.json"
    file.write_text('{"cat": [["Does {subject} bark?", "no"]]}')
    known = world_of(["cat", "dog"], file)
    assert any(language_text(n, known, 0).prompt == "USER: Does the cat bark?\nASSISTANT:" for n in range(60))
    for text, words in (
        ('{"cow": []}', "names 'cow'"),
        ('{"cat": [["Why?", "no"]]}', "without .subject."),
        ("[", "read"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            world_of(["cat", "dog"], file)


def test_llavas_format():
    text = picture_text(examples(1)[0], WORLD, True, 0, 0, caption=True)
    (item,) = llava_items([text])
    human, gpt = item["conversations"]
    assert item["image"] == text.image and human["value"].startswith("<image>\n") and human["from"] == "human"
    assert gpt == {"from": "gpt", "value": "a photo of an equilateral triangle"}
    assert isinstance(WORLD, World)
