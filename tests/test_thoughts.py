"""Protects: what a thinking model thinks is not scored as its answer; end tokens; a question that templates lose."""

import json
import shutil

import pytest
from conftest import script

from vlmclassifier import load_vlm
from vlmclassifier.ranking import Ranker
from vlmclassifier.records import Prediction, Reply, UserError
from vlmclassifier.scoring import Answers, metric_hits
from vlmclassifier.thoughts import MARKS, final_answer, opened_by
from vlmclassifier.vlm.model import end_tokens

NAMES = ("daisy", "tulip", "rose")


@pytest.mark.parametrize(
    ("text", "prompt", "answer", "is_cut"),
    [
        ("a rose", "", "a rose", False),
        ("<think>daisy, tulip, rose</think> rose", "", " rose", False),
        ("daisy? no.</think>\n\nrose", "<|im_start|>assistant\n<think>\n", "\n\nrose", False),  # opened by the prompt
        ("<think>daisy, tulip", "", "", True),  # the token limit
        ("daisy, tulip", "assistant\n<think>\n", "", True),
        ("a rose", "assistant\n<think>\n\n</think>\n\n", "a rose", False),  # switched off by the template
        ("<think>a</think> b <think>c", "", "", True),
        ("<think>a</think> b <think>c</think> rose", "", " rose", False),
        ("tulip", "Is <think> a word?", "tulip", False),
        ("◁think▷tulip◁/think▷rose", "", "rose", False),
        ("<|channel>thought\ntulip<channel|>rose", "", "rose", False),
        ("<|channel|>analysis<|message|>tulip<|end|><|channel|>final<|message|>rose", "", "rose", False),
    ],
)  # fmt: skip
def test_the_answer_follows_the_thought(text, prompt, answer, is_cut):
    assert final_answer(text, prompt) == (answer, is_cut)


def test_every_family_of_marks_is_read_and_recognised_at_the_end_of_a_prompt():
    for opening, closing in MARKS:
        assert final_answer(f"{opening}tulip{closing}rose") == ("rose", False)
        assert final_answer(f"{opening}tulip") == ("", True)
        assert opened_by(f"assistant\n{opening}\n") == (opening, closing)


def prediction(output, label="tulip", **more):
    return Prediction("a.jpg", label, NAMES.index(label), "Q", NAMES, output, None, **more)


def test_metrics_score_the_answer_and_count_cut_thoughts():
    rows = [
        prediction("<think>daisy, tulip, rose</think> rose"),
        prediction("<think>daisy, tulip, rose</think> a tulip"),
        prediction("<think>daisy, tulip"),
        prediction("", reply=Reply("length", "m", 10, 500)),  # the budget of a reasoning model went into its thought
        prediction("", reply=Reply("empty", "m", 10, 1)),
    ]
    answers = Answers(rows, NAMES, "vlm")
    hits = metric_hits(answers)
    assert hits["accuracy"] == hits["contains_words"] == hits["unique"] == [False, True, False, False, False]
    assert hits["cut"] == [False, False, True, True, False]
    assert not any(hits["echo"]) and not any(hits["several_candidates"])
    assert rows[0].output == "<think>daisy, tulip, rose</think> rose"  # the raw text stays in the rows
    assert "cut" not in metric_hits(Answers(rows[:2], NAMES, "vlm"))


@pytest.fixture
def thinking(tiny, tmp_path):
    """A Qwen whose template opens a thought: `template(text)` replaces it; the marks are special tokens."""
    folder = shutil.copytree(tiny / "qwen3-vl-8b", tmp_path / "thinking")

    def template(text):
        (folder / "chat_template.jinja").write_text(text)
        return load_vlm(str(folder))

    return template


IMAGE = "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
CONTENT = "{% for m in messages %}{% for c in m.content %}" + IMAGE + "{% else %}{{ c.text }}{% endif %}{% endfor %}"
TEMPLATE = CONTENT + "{% endfor %} assistant:"


def test_thoughts_are_switched_off_where_the_template_has_a_switch(thinking):
    switch = "{% if enable_thinking is false %}<think>\n\n</think>{{ ' ' }}{% else %}<think>{% endif %}"
    vlm = thinking(TEMPLATE + switch)
    assert vlm.prompt("What?").endswith("What? assistant:<think>\n\n</think> ") and not vlm.opens_thought
    vlm = thinking(TEMPLATE + switch.replace("enable_thinking", "thinking"))
    assert vlm.prompt("What?").endswith("</think> ")


def test_a_template_without_a_switch_causes_a_warning_and_an_empty_thought_before_ranked_names(
    thinking, own, tmp_path, capsys
):
    vlm = thinking(TEMPLATE + "<think>\n")
    assert vlm.opens_thought and vlm.prompt("What?").endswith("assistant:<think>")
    ranker = Ranker(vlm, NAMES, "What?", "A")
    assert ranker.prompt.endswith("assistant:<think>\n\n</think>\n\nA") and "closed before the names" in ranker.report
    module = script("main_results/classify_vlm.py")
    module.main(module.Args(vlm.spec.source, out=tmp_path / "run", max_new_tokens=4, **own.args))
    printed = capsys.readouterr()
    assert "warning: thinking thinks before it answers" in printed.err
    assert "100.0% of the answers are missing" in printed.out  # four tokens do not close the thought


def test_marks_that_are_special_tokens_are_kept_in_the_answer(tiny):
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    tokenizer = vlm.processor.tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": ["[THINK]", "[/THINK]", "<|other|>"]})
    vlm = type(vlm)(vlm.model, vlm.processor, vlm.spec)
    ids = tokenizer("[THINK]a cat[/THINK]a dog<|other|>", add_special_tokens=False)["input_ids"]
    assert vlm._decode(ids) == tokenizer.decode(ids).replace("<|other|>", "") and "[/THINK]" in vlm._decode(ids)


def test_marks_of_several_special_tokens_are_kept_too(tiny):
    """gpt-oss and Kimi write their marks as several special tokens each."""
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    tokenizer = vlm.processor.tokenizer
    parts = ["<|channel|>", "<|message|>", "<|end|>", "<|open|>", "<|close|>", "<|sep|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": parts})
    vlm = type(vlm)(vlm.model, vlm.processor, vlm.spec)
    for text in (
        "<|channel|>analysis<|message|>tulip<|end|><|channel|>final<|message|>rose",
        "<|open|>think<|sep|>tulip<|close|>think<|sep|>rose",
    ):
        answer = vlm._decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert final_answer(answer) == ("rose", False) and "<|end|>" not in answer


def test_end_tokens_of_all_sources_count(tiny, tmp_path):
    """InstructBLIP stores 1, its tokenizer's is 2: the answers ran on behind their end."""
    assert end_tokens(1, None, [2, 5]) == [1, 2, 5] and end_tokens(None) == []
    folder = shutil.copytree(tiny / "instructblip-7b", tmp_path / "copy")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 1}))
    vlm = load_vlm("instructblip-7b", folder)
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.eos_token_id == 2 and vlm.model.generation_config.eos_token_id == [1, 2]
    assert vlm.model.language_model.generation_config.eos_token_id == [1, 2]
    words = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    for end in (1, 2):
        assert vlm._decode([*words, end, *words]) == tokenizer.decode(words)


def test_a_template_that_loses_the_question_is_refused(thinking):
    """It reads the content of a message as text; so does one that shows only the first letters of it."""
    for text in ("c.content", "c.text[:20]"):
        vlm = thinking(TEMPLATE.replace("c.text", text))
        with pytest.raises(UserError, match="leaves out the question: it may read the content"):
            vlm.prompt('What type of object is in this photo? Choose one from "daisy, tulip, rose".')
