"""Protects: the exact text of the paper's prompts, and candidate lists that depend only on (seed, example id)."""

import pytest

from vlmclassifier.prompts import TEMPLATES, THOUGHT, PromptSetting, clip_settings, draw_candidates, prompt_settings
from vlmclassifier.records import Example, UserError

NAMES = (*(f"class {i}" for i in range(50)), "class 7")  # one duplicate name
EXAMPLES = [Example(f"{i}.jpg", f"/{i}.jpg", f"class {i % 50}", i % 50, "test") for i in range(200)]


def test_templates_have_the_exact_text():
    question = "What type of object is in this photo?"
    assert PromptSetting(NAMES).question(EXAMPLES[0]).text == question
    filled = {name: template.format(question=question, thought="") for name, template in TEMPLATES.items()}
    assert filled["llava-1.5"] == "USER: <image>\nWhat type of object is in this photo?\nASSISTANT:"
    assert filled["blip"] == "Question: What type of object is in this photo? Answer:"
    with_thought = {name: template.format(question="Q?", thought=THOUGHT) for name, template in TEMPLATES.items()}
    assert with_thought["llava-1.5"] == "USER: <image>\nQ?\nASSISTANT: Let's think step by step."
    assert with_thought["blip"] == "Question: Q? Let's think step by step. Answer:"


def test_closed_world_prompt_lists_the_candidates_in_one_pair_of_quotes():
    question = PromptSetting(("class 0", "a"), "2", order="fixed").question(EXAMPLES[0])
    assert question.text == 'What type of object is in this photo? Choose one from "class 0, a".'
    assert question.choices == ("class 0", "a")


@pytest.mark.parametrize("count", [2, 5, 50])
def test_candidates_contain_the_label_once(count):
    for example in EXAMPLES:
        candidates = draw_candidates(example, NAMES, count)
        assert len(candidates) == len(set(candidates)) == count and example.label in candidates


def test_candidates_depend_only_on_seed_and_example_id():
    forward = {e.id: draw_candidates(e, NAMES, 5) for e in EXAMPLES}
    backward = {e.id: draw_candidates(e, NAMES, 5) for e in reversed(EXAMPLES)}
    assert forward == backward
    assert len(set(forward.values())) > 190
    assert sum(forward[e.id] == draw_candidates(e, NAMES, 5, seed=1) for e in EXAMPLES) < 5


def test_candidates_of_one_example():
    """Recorded rows depend on their candidates: a change of the sampling would break every started run."""
    assert draw_candidates(EXAMPLES[3], NAMES, 4) == ("class 23", "class 49", "class 3", "class 10")


def test_position_of_the_label_is_uniform():
    positions = [draw_candidates(e, NAMES, 4).index(e.label) for e in EXAMPLES]
    for position in range(4):
        assert 30 <= positions.count(position) <= 70


def test_fixed_order_is_the_order_of_the_class_list():
    for example in EXAMPLES[:20]:
        candidates = draw_candidates(example, NAMES, 9, order="fixed")
        assert sorted(candidates, key=NAMES.index) == list(candidates)
        assert set(candidates) == set(draw_candidates(example, NAMES, 9))
    assert draw_candidates(EXAMPLES[0], NAMES, 50, order="fixed") == NAMES[:50]


def test_number_of_candidates():
    assert PromptSetting(NAMES, "none").count is None
    assert PromptSetting(NAMES, "all").count == 50
    assert PromptSetting(NAMES, "20").count == 20
    for value, message in [
        ("51", "outside 2 to 50"),
        ("1", "outside"),
        ("0", "outside"),
        ("many", "neither"),
        ("-3", "neither"),
    ]:
        with pytest.raises(UserError, match=message):
            PromptSetting(NAMES, value)


def name(*values, **options) -> str:
    return PromptSetting(NAMES, *values, **options).name


def test_names_of_settings():
    assert name() == "open_world"
    assert name("all") == "closed_world"
    assert name("20") == "20_classes"
    assert name("all", order="fixed", chain_of_thought=True) == "closed_world-label_fixed_order-cot"
    assert name("none", wording="alternative_1", order="fixed", seed=3) == "open_world-prompt_alternative_1"
    assert name("5", seed=3) == "5_classes-seed_3"


def test_prompt_settings_have_every_combination_once():
    settings = prompt_settings(NAMES, ("none", "5"), ("random", "fixed"), seed=3)
    assert [s.name for s in settings] == ["open_world", "5_classes-seed_3", "5_classes-label_fixed_order-seed_3"]
    assert settings[2] == PromptSetting(NAMES, "5", "fixed", seed=3)
    with pytest.raises(UserError, match="outside 2 to 50"):
        prompt_settings(NAMES, ("51",))


def test_setting_is_restored_from_run_json():
    setting = PromptSetting(NAMES, "5", "fixed", "alternative_2", True, 7)
    assert setting.config == {
        "candidates": "5", "order": "fixed", "wording": "alternative_2", "chain_of_thought": True, "seed": 7,
    }  # fmt: skip
    assert PromptSetting.from_config(setting.config | {"classes": list(NAMES), "model": "x"}) == setting


def test_clip_setting_has_a_seed_only_with_sampled_candidates():
    """With all classes nothing is sampled, so every seed gives the same cell of Table 1."""
    assert [s.name for s in clip_settings(NAMES, ("all", "5"), seed=3)] == ["closed_world", "5_classes-seed_3"]
    with pytest.raises(UserError, match="always chooses among class names"):
        clip_settings(NAMES, ("none",))
