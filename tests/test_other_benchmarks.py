"""Protects: general benchmarks are read from official and hub files and scored by their official definitions."""

import io
import json
from pathlib import Path

import pytest
import yaml
from api_server import KEY, Server
from conftest import noise, script

from vlmclassifier.questions.vqa_data import VQA_BENCHMARKS, VqaSetting, load_vqa
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.scoring.vqa import anls, normalised, parse_judged, pope_scores, says_yes, score_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Answer, is 2!", "answer is 2"), ("two dogs", "2 dogs"), ("a cat.", "cat"), ("3.5", "3.5"),
        ("dont", "don't"),
        ("yes/no", "yes no"), ("yes / no", "yes no"), ("1,000", "1000"), ("Dave's", "dave 's"), ("line\none", "line 1"),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_by_textvqas_evaluation(answer, expected):
    assert normalised(answer) == expected


def test_vqa_accuracy_is_the_mean_over_annotators():
    """Of ten annotators: three say so: each of the seven others sees three, the three see two: (7 + 3 x 2/3) / 10."""
    answers = ["stop"] * 3 + ["go"] * 7
    assert vqa_accuracy("Stop.", answers) == pytest.approx(0.9) and vqa_accuracy("go", answers) == 1
    assert vqa_accuracy("stop", ["stop"] + ["go"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("wait", answers) == 0


def test_pope_reads_the_first_sentence():
    assert says_yes("Yes, there is.") and says_yes("There is a dog. No cat.") and not says_yes("No, there is not")
    assert not says_yes("there is not a cat") and says_yes("Nothing")  # whole words only
    said, true = [True, True, False, True], [True, False, True, True]
    scores = {score.metric: score.value for score in pope_scores(said, true, [0, 1, 2, 3], ("m", "s", "d"), ())}
    assert scores["precision"] == scores["recall"] == pytest.approx(200 / 3)
    assert scores["accuracy"] == pytest.approx(200 / 3) and scores["plain_accuracy"] == 50 and scores["yes"] == 75


def test_anls_has_a_threshold():
    assert anls("Hello", ["hello"]) == 1 and anls("helo", ["hello"]) == pytest.approx(0.8)
    assert anls("ab", ["ac"]) == 0.5 and anls("abc", ["axy"]) == 0  # one half counts in DocVQA's own evaluation
    assert anls("xyz", ["hello"]) == 0 and anls("he", ["hello", "the"]) == pytest.approx(2 / 3)


def test_a_judges_number_is_read():
    assert parse_judged("0.5") == 0.5 and parse_judged(" 1.0 |") == 1 and parse_judged("good") is None
    assert parse_judged("7") is None and parse_judged("1. The prediction") is None and parse_judged("-0.5") is None


def test_thoughts_are_no_answers():
    config = {"metric": "f1", "tags": []}
    rows = [Prediction("1", '["yes"]', 7, "p", None, "<think>There is no dog? Wait.</think>Yes", None)]
    scores = {score.metric: score.value for score in score_vqa(Path(), config, rows, ("m", "s", "d"))}
    assert scores["yes"] == scores["accuracy"] == 100


def files_of(folder):
    """The official files of all benchmarks, with two questions each, and their images."""
    for number in range(2):
        noise((60, 40), number).save(folder / f"{number}.jpg")
    write = lambda name, values: (folder / name).write_text(json.dumps(values))  # noqa: E731
    rows = [
        {"question_id": n, "image_id": str(n), "question": "What is written?", "answers": ["stop"] * 10} for n in (0, 1)
    ]
    write("textvqa.json", {"data": rows})
    write("ocr.json", {"data": [{"image_id": "0", "ocr_tokens": ["STOP", "ALL"]}]})
    pope = [
        {"question_id": n, "image": f"{n}.jpg", "text": "Is there a dog?", "label": ["yes", "no"][n]} for n in (0, 1)
    ]
    (folder / "pope.json").write_text("".join(json.dumps(row) + "\n" for row in pope))
    (folder / "questions").mkdir()
    question = {"questionId": "q0", "abcLabel": False, "answerTexts": ["x", "y", "z", "w"], "correctAnswer": 2}
    write("questions/0.json", {"imageName": "0.jpg", "questions": {"Which?": question}})
    write("questions/1.json", {"imageName": "1.jpg", "questions": {"And?": question | {"questionId": "q1"}}})
    (folder / "ai2d_test_ids.csv").write_text("0\n7\n")
    write("docvqa.json", {"data": [{"questionId": 7, "image": "1.jpg", "question": "Who?", "answers": ["me", "I"]}]})
    write("mmvet.json", {"v1_0": {"imagename": "0.jpg", "question": "What?", "answer": "x <AND> y", "capability": []}})
    return {"textvqa": "textvqa.json", "pope_popular": "pope.json", "pope_adversarial": "pope.json", "ai2d": ".",
            "docvqa": "docvqa.json", "mmvet": "mmvet.json"}  # fmt: skip


@pytest.mark.parametrize("key", VQA_BENCHMARKS)
def test_official_files_are_answered_and_scored(key, tiny, tmp_path, capsys):
    files = files_of(tmp_path)
    module = script("imagewikiqa/other_benchmarks.py")
    args = module.Args("llava-1.5-7b", tiny / "llava-1.5-7b", benchmark=key, source=tmp_path / files[key],
                       image_root=tmp_path, out=tmp_path / "runs" / "a", max_new_tokens=4)  # fmt: skip
    if key == "textvqa":
        with pytest.raises(UserError, match="No question has OCR words: give --ocr FILE, or --no-use-ocr"):
            module.main(args)
        args.ocr = tmp_path / "ocr.json"
    module.main(args)
    printed = capsys.readouterr().out
    rows = read_run(tmp_path / "runs" / "a")[1]
    expected = {
        "textvqa": "What is written?\nReference OCR token: STOP, ALL\nAnswer the question using a single word or ",
        "ai2d": "Which?\nA. x\nB. y\nC. z\nD. w\nAnswer with the option's letter from the given choices directly.",
        "mmvet": "\nWhat?\nASSISTANT",
    }  # fmt: skip
    assert expected.get(key, "Answer the question using a single word or phrase.") in rows[0].prompt
    assert "needs a judge" in printed if key == "mmvet" else "accuracy" in printed and "questions" in printed
    table = script("imagewikiqa/table.py")
    if key == "mmvet":
        with pytest.raises(UserError, match="No scores in .*: a is not judged: the same command with --judge MODEL"):
            table.main(table.Args(tmp_path / "runs"))
    else:
        table.main(table.Args(tmp_path / "runs"))
        assert "Table 13: general benchmarks" in capsys.readouterr().out
    source = tmp_path / "broken.json"
    source.write_text("{}")
    if key != "ai2d":
        args.source = source
        with pytest.raises(UserError, match=r"is no file of|has no questions of"):
            module.main(args)


def test_a_judge_scores_every_answer_once(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    files_of(tmp_path)
    module = script("imagewikiqa/other_benchmarks.py")
    args = module.Args("llava-1.5-7b", tiny / "llava-1.5-7b", benchmark="mmvet", source=tmp_path / "mmvet.json",
                       image_root=tmp_path, out=tmp_path / "a", max_new_tokens=4, judge="j",
                       judge_key_variable="MY_KEY")  # fmt: skip
    with Server(text="a good answer") as server:
        args.judge_url = f"{server.url}/v1"
        with pytest.raises(UserError, match="The judge j answers 'a good answer' about v1_0, which is no score"):
            module.main(args)
        server.text = "0.7"
        module.main(args)
        assert "accuracy 70.0" in capsys.readouterr().out
        calls = sum(server.calls.values())
        module.main(args)
        assert sum(server.calls.values()) == calls and "j)" in capsys.readouterr().out  # the judge is a tag
        args.judge = "another"
        with pytest.raises(UserError, match="was judged by another model"):
            module.main(args)


def test_parquet_files_of_the_hub_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    noise((30, 20)).save(stream, "PNG")
    image = {"bytes": stream.getvalue(), "path": "x.png"}
    tables = {
        "textvqa": [{"question_id": 5, "question": "Q?", "answers": ["a"] * 10, "ocr_tokens": ["w"], "image": image}],
        "pope_popular": [{"question_id": "1", "question": "Q?", "answer": "yes", "category": "popular", "image": image},
                         {"question_id": "2", "question": "Q?", "answer": "no", "category": "random", "image": image}],
        "ai2d": [{"question": "Q?", "options": ["x", "y"], "answer": "1", "image": image}],
        "docvqa": [{"questionId": "9", "question": "Q?", "answers": ["a", "b"], "image": image}],
    }  # fmt: skip
    for key, rows in tables.items():
        (tmp_path / key).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / key / "part.parquet")
        (question,) = load_vqa(key, tmp_path / key, None, tmp_path / f"{key}-images")
        assert (tmp_path / f"{key}-images" / question.image).read_bytes() == image["bytes"]
        answers = {"textvqa": ("a",) * 10, "pope_popular": ("yes",), "ai2d": ("B",), "docvqa": ("a", "b")}[key]
        assert question.answers == answers
    other = io.BytesIO()
    noise((30, 20), 1).save(other, "PNG")  # another data set without ids, read into the same folder
    rows = [tables["ai2d"][0] | {"image": {"bytes": other.getvalue(), "path": "y.png"}}]
    (tmp_path / "more").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "more" / "part.parquet")
    (question,) = load_vqa("ai2d", tmp_path / "more", None, tmp_path / "ai2d-images")
    assert (tmp_path / "ai2d-images" / question.image).read_bytes() == other.getvalue()
    for split in ("train", "validation"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "more" / f"{split}-0.parquet")
    with pytest.raises(UserError, match="parquet files of several splits .train, validation."):
        load_vqa("ai2d", tmp_path / "more", None, tmp_path / "i")
    assert "Reference OCR token: w" in VqaSetting(VQA_BENCHMARKS["textvqa"]).shown(
        load_vqa("textvqa", tmp_path / "textvqa", None, tmp_path / "i")[0]
    )  # fmt: skip


def test_tasks_of_lmms_eval_hold_what_it_needs(realdata, tmp_path, monkeypatch, capsys):
    """The task's rows, question and metric; lmms-eval itself is not installed here."""
    import importlib.util

    (tmp_path / "paths.toml").write_text(f"[benchmarks]\ncaltech = '{realdata}'\n")
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    module = script("imagewikiqa/other_benchmarks.py")
    module.main(module.Args(export="lmms-eval", out=tmp_path / "tasks"))
    printed = capsys.readouterr().out
    assert "--tasks vlmclassifier_caltech --include_path" in printed and "Not written: imagenet" in printed
    folder = tmp_path / "tasks" / "caltech"
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.safe_load((folder / "caltech.yaml").read_text())
    spec = importlib.util.spec_from_file_location("utils", folder / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    file = Path(task["dataset_kwargs"]["data_files"]["test"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 120 and utils.doc_to_visual(rows[0])[0].mode == "RGB"
    assert utils.doc_to_text(rows[0]) == "What type of object is in this photo?"
    label = rows[0]["label"]
    assert utils.process_results(rows[0], [f"It is a {label.upper()}."]) == {"contains": 1.0, "exact": 0.0}
    assert utils.process_results(rows[0], [f"{label}."]) == {"contains": 1.0, "exact": 1.0}
    assert task["doc_to_text"] == "utils.doc_to_text" and task["task"] == "vlmclassifier_caltech"
