"""Protects: questions are answered through the user's path, with and without image and name, and every run resumes."""

import csv
import json
import shutil

import pytest
import torch
from api_server import KEY, Server
from conftest import noise, script

from vlmclassifier import load_vlm
from vlmclassifier.questions.items import make_question, read_questions
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

LLAVA = "llava-1.5-7b"


@pytest.fixture
def wiki(tmp_path):
    """Six questions about three images."""
    rows = []
    for number in range(6):
        noise((60, 40), number // 2).save(tmp_path / f"{number // 2}.png")
        options = ("one", "two", "three", "four")[: 4 - number % 2]
        rows.append(make_question(f"{number // 2}.png", f"How many parts has this object, {number % 3}?", options,
                                  number % 3, ["newt", "vase"][number % 2]))  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(row.to_line() for row in rows))
    return tmp_path


def answer(wiki, tiny, out, model=LLAVA, **options):
    module = script("imagewikiqa/answer.py")
    settings = {"weights": tiny / model, "questions": wiki / "q.jsonl", "max_new_tokens": 4, "batch_size": 2}
    module.main(module.Args(model=model, out=wiki / out, **settings | options))


def rows_of(folder):
    return read_run(folder)[1]


@pytest.mark.parametrize("key", [LLAVA, "qwen3-vl-8b", "paligemma2-3b"])
def test_answers_are_those_of_the_model(key, wiki, tiny, capsys):
    """With the image, with the name, and of the text alone; the prompt is the paper's."""
    answer(wiki, tiny, "a", key, given=("image", "image+name", "text", "text+own"))
    assert "No letter found in" in capsys.readouterr().out
    vlm, questions = load_vlm(key, tiny / key), read_questions(wiki / "q.jsonl")
    plain, named, text, own = (rows_of(wiki / f"a-multiple_choice{end}")
                               for end in ("", "-with_name", "-text_only", "-text_only-own_name"))  # fmt: skip
    image = noise((60, 40), 0)
    prompt = vlm.prompt(questions[0].text, chain_of_thought=True)
    assert plain[0].prompt == prompt and "Let's think step by step." in prompt
    assert plain[0].output == vlm.generate(vlm.prepare([image], [prompt]), 4)[0]
    assert "has newt, 0" in named[0].prompt and named[0].label == "A" and named[0].choices == questions[0].options
    inputs = vlm.processor.tokenizer(text[0].prompt, return_tensors="pt") if key != "paligemma2-3b" else None
    if inputs is not None and "token_type_ids" not in inputs:
        with torch.inference_mode():
            out = vlm.model.generate(**inputs, max_new_tokens=4)
        assert vlm._decode(out[0, inputs["input_ids"].shape[1] :].tolist()) == text[0].output
    name = rows_of(wiki / "a-naming")[0].output.strip().removesuffix(".") or "object"
    assert name in own[0].prompt and rows_of(wiki / "a-naming")[0].label == "newt"
    answer(wiki, tiny, "b", key, batch_size=5)
    assert [row.output for row in rows_of(wiki / "b")] == [row.output for row in plain]


@pytest.mark.parametrize("key", [LLAVA, "blip2-2.7b", "gemma3-4b"])
def test_ranked_answers_have_the_highest_log_probability(key, wiki, tiny):
    """Equal to a full forward pass per option, with the end token; the same for other batch sizes."""
    from vlmclassifier.ranking.one_by_one import full_forward_log_probs

    answer(wiki, tiny, "r", key, form=("rank_options", "rank_letters"))
    vlm, questions = load_vlm(key, tiny / key), read_questions(wiki / "q.jsonl")
    for form, shown in (("options", lambda q: q.question), ("letters", lambda q: q.text)):
        rows = rows_of(wiki / f"r-{form}_log_prob")
        for question, row in zip(questions[:2], rows, strict=False):
            image = noise((60, 40), int(question.image[0]))
            prompt = vlm.prompt(shown(question))
            candidates = question.options if form == "options" else "ABCD"[: len(question.options)]
            tokenizer, end = vlm.processor.tokenizer, vlm.processor.tokenizer.eos_token_id
            from vlmclassifier.finetuning.collator import answer_ids

            suffix = vlm.prompt_suffix(prompt)
            ids = [torch.tensor([*answer_ids(tokenizer, prompt + suffix, one), end]) for one in candidates]
            found = full_forward_log_probs(vlm, vlm.process([image], [prompt]), [(one, one) for one in ids])
            assert row.ranking[0] == int(found.argmax()) and row.output == candidates[row.ranking[0]]
    answer(wiki, tiny, "s", key, form=("rank_options",), batch_size=6)
    assert [row.ranking for row in rows_of(wiki / "s")] == [row.ranking for row in rows_of(wiki / "r-options_log_prob")]


def test_a_run_continues_and_the_table_compares(wiki, tiny, tmp_path, capsys):
    from test_finetuning import finetune

    class Own:
        args = {"benchmark": str(tmp_path / "m.jsonl"), "classes": tmp_path / "c.json"}

    (tmp_path / "c.json").write_text('["newt", "vase"]')
    rows = [
        {"image": f"{n}.png", "label": ["newt", "vase"][n % 2], "split": ["train", "test"][n // 2]} for n in range(3)
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = finetune(tiny, Own, tmp_path / "t", steps=1, epochs=None, held_out=0.0) / "last"
    options = {"form": ("free",), "given": ("image", "text+name", "text+own")}
    answer(wiki, tiny, "runs/base", **options | {"limit": 3})
    before = [row.output for row in rows_of(wiki / "runs" / "base-free_answer")]
    answer(wiki, tiny, "runs/base", **options)
    assert [row.output for row in rows_of(wiki / "runs" / "base-free_answer")][:3] == before
    answer(wiki, tiny, "runs/tuned", adapter=adapter, **options)
    table = script("imagewikiqa/table.py")
    capsys.readouterr()
    table.main(table.Args(wiki / "runs", all=True))
    printed = capsys.readouterr().out
    assert "| Random " in printed and "paper only (96.5)" in printed and "sign flips" in printed
    with open(wiki / "runs" / "comparisons.csv", newline="") as stream:
        compared = list(csv.DictReader(stream))
    assert (
        len(compared) == 3 and {row["n"] for row in compared} == {"6"} and {row["groups"] for row in compared} == {"3"}
    )
    with open(wiki / "runs" / "causes.csv", newline="") as stream:
        for row in csv.DictReader(stream):
            assert int(row["errors"]) == sum(int(row[name]) for name in ("recognition", "knowledge", "joining"))
    with pytest.raises(UserError, match="another configuration"):
        answer(wiki, tiny, "runs/base-free_answer", form=("free",), max_new_tokens=5)


def test_an_api_answers(wiki, tiny, monkeypatch, capsys):
    """Without an image where none is given; PNG where it is asked for; errors are asked for again."""
    monkeypatch.setenv("MY_KEY", KEY)
    plan = lambda image, call: 503 if call == 1 else "ok"  # noqa: E731
    with Server(plan, text="I think (B)") as server:
        options = {"weights": None, "base_url": f"{server.url}/v1", "key_variable": "MY_KEY", "model": "m",
                   "given": ("image", "text"), "image_format": "png"}  # fmt: skip
        answer(wiki, tiny, "api", **options)
        rows = rows_of(wiki / "api-multiple_choice")
        assert all(row.output == "I think (B)" and row.reply.finish == "stop" for row in rows)
        assert "Estimate, m: " in capsys.readouterr().out
        assert any("Let's think" in question for question in server.questions.values())
        calls = sum(server.calls.values())
        answer(wiki, tiny, "api", **options)
        assert sum(server.calls.values()) == calls
        with pytest.raises(UserError, match="APIs give no log-probabilities"):
            answer(wiki, tiny, "rank", **options | {"form": ("rank_options",)})


def test_a_corrected_answer_is_not_scored_with_the_old_one(wiki, tiny):
    answer(wiki, tiny, "a", form=("free",))
    text = (wiki / "q.jsonl").read_text()
    (wiki / "q.jsonl").write_text(text.replace('"label": "A"', '"label": "B"', 1))
    with pytest.raises(UserError, match="label"):
        answer(wiki, tiny, "a", form=("free",))
    lines = text.splitlines(keepends=True)
    (wiki / "q.jsonl").write_text("".join(lines[::-1]))  # groups do not depend on the order
    before = {row.example_id: row.class_index for row in rows_of(wiki / "a")}
    answer(wiki, tiny, "b", form=("free",))
    assert {row.example_id: row.class_index for row in rows_of(wiki / "b")} == before


def test_mistakes_are_told(wiki, tiny):
    with pytest.raises(UserError, match="blip2-2.7b cannot answer without an image: leave out --given text"):
        answer(wiki, tiny, "blip", "blip2-2.7b", given=("text",))
    (wiki / "1.png").unlink()
    with pytest.raises(UserError, match="q.jsonl row 3: there is no image .*1.png: set --image-root"):
        answer(wiki, tiny, "gone")
    answer(wiki, tiny, "text", given=("text",))  # needs no image
    bad = wiki / "bad.jsonl"
    bad.write_text((wiki / "q.jsonl").read_text().replace('"0.png"', '"../../0.png"'))
    with pytest.raises(UserError, match="the image path ../../0.png leaves"):
        answer(wiki, tiny, "bad", questions=bad)


def test_only_some_of_the_released_questions_are_a_tag(labels, tiny, tmp_path):
    file = shutil.copy(labels / "imagewikiqa.jsonl", tmp_path / "imagewikiqa.jsonl")
    module = script("imagewikiqa/answer.py")
    for limit, tags in ((5, ("5 of 2,000 questions",)), (None, ())):
        args = module.Args(questions=file, limit=limit)
        assert module.evaluation(args, read_questions(file, limit), tmp_path).tags == tags
    file.write_text(file.read_text().replace('"label": "A"', '"label": "B"', 1))
    assert module.evaluation(args, read_questions(file), tmp_path).tags == ("other questions than the released",)
