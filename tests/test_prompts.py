"""Protects: the exact words of the paper's prompts, and candidate lists that depend on (seed, example id) alone."""

import pytest

from vlmclassifier.prompts import (
    TEMPLATES,
    THOUGHT,
    Way,
    build_question,
    draw_candidates,
    parse_candidates,
    setting_name,
    ways,
)
from vlmclassifier.records import Example, UserError

NAMES = [f"class {i}" for i in range(50)] + ["class 7"]  # one double name
EXAMPLES = [Example(f"{i}.jpg", "b", f"/{i}.jpg", f"class {i % 50}", i % 50, "test") for i in range(200)]


def test_templates_word_by_word():
    question = "What type of object is in this photo?"
    assert build_question(EXAMPLES[0], NAMES, None).text == question
    fill = {name: template.format(question=question, thought="") for name, template in TEMPLATES.items()}
    assert fill["llava-1.5"] == "USER: <image>\nWhat type of object is in this photo?\nASSISTANT:"
    assert fill["blip"] == "Question: What type of object is in this photo? Answer:"
    think = {name: template.format(question="Q?", thought=THOUGHT) for name, template in TEMPLATES.items()}
    assert think["llava-1.5"] == "USER: <image>\nQ?\nASSISTANT: Let's think step by step."
    assert think["blip"] == "Question: Q? Let's think step by step. Answer:"


def test_closed_world_lists_the_choices_in_one_pair_of_quotes():
    question = build_question(EXAMPLES[0], ["class 0", "a"], 2, order="fixed")
    assert question.text == 'What type of object is in this photo? Choose one from "class 0, a".'
    assert question.choices == ("class 0", "a") and question.answer == "class 0"


@pytest.mark.parametrize("count", [2, 5, 50])
def test_candidates_hold_the_true_name_once(count):
    for example in EXAMPLES:
        drawn = draw_candidates(example, NAMES, count)
        assert len(drawn) == len(set(drawn)) == count and example.label in drawn


def test_candidates_depend_on_seed_and_id_alone():
    forwards = {e.id: draw_candidates(e, NAMES, 5) for e in EXAMPLES}
    backwards = {e.id: draw_candidates(e, NAMES, 5) for e in reversed(EXAMPLES)}
    assert forwards == backwards
    assert len(set(forwards.values())) > 190
    assert sum(forwards[e.id] == draw_candidates(e, NAMES, 5, seed=1) for e in EXAMPLES) < 5


def test_a_pinned_draw():
    """Recorded answers name their candidates: a changed draw would break every started run."""
    assert draw_candidates(EXAMPLES[3], NAMES, 4) == PINNED


PINNED = ("class 23", "class 49", "class 3", "class 10")


def test_the_true_name_has_no_favourite_place():
    places = [draw_candidates(e, NAMES, 4).index(e.label) for e in EXAMPLES]
    assert all(30 <= places.count(place) <= 70 for place in range(4))


def test_fixed_order_is_the_class_lists():
    for example in EXAMPLES[:20]:
        drawn = draw_candidates(example, NAMES, 9, order="fixed")
        assert sorted(drawn, key=NAMES.index) == list(drawn)
        assert set(drawn) == set(draw_candidates(example, NAMES, 9))
    assert draw_candidates(EXAMPLES[0], NAMES, 50, order="fixed") == tuple(NAMES[:50])


def test_number_of_candidates():
    assert parse_candidates("none", NAMES) is None
    assert parse_candidates("all", NAMES) == 50
    assert parse_candidates("20", NAMES) == 20
    for wrong, words in [
        ("51", "outside 2 to 50"),
        ("1", "outside"),
        ("0", "outside"),
        ("many", "neither"),
        ("-3", "neither"),
    ]:
        with pytest.raises(UserError, match=words):
            parse_candidates(wrong, NAMES)


def test_settings_have_the_papers_names():
    assert setting_name("none") == "open_world"
    assert setting_name("all") == "closed_world"
    assert setting_name("20") == "20_classes"
    assert setting_name("all", order="fixed", chain_of_thought=True) == "closed_world-label_fixed_order-cot"
    assert setting_name("none", "alternative_1", order="fixed", seed=3) == "open_world-prompt_alternative_1"
    assert setting_name("5", seed=3) == "5_classes-seed_3"


def test_ways_are_every_combination_once():
    asked = ways(("none", "5"), ("random", "fixed"), ("base",), NAMES, seed=3)
    assert list(asked) == ["open_world", "5_classes-seed_3", "5_classes-label_fixed_order-seed_3"]
    assert asked["5_classes-label_fixed_order-seed_3"] == Way("5", "fixed", "base")
    with pytest.raises(UserError, match="outside 2 to 50"):
        ways(("51",), ("random",), ("base",), NAMES)
