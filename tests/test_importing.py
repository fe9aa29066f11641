"""Protects: output files of the paper's own code, in every form, become runs that are scored like ours."""

import json

import pandas as pd
import pytest
from conftest import run_script, script

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.importing import import_run
from vlmclassifier.prompts import Way
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

FLOWERS = class_names(BENCHMARKS["flowers"])
OPEN, CLOSED = Way("none", "random", "base"), Way("all", "random", "base")
LIST = ", ".join(FLOWERS)


def openai(text: str) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def row(number: int, label: str, **more) -> dict:
    return {"image": f"./data/Flowers102/jpg/image_{number:05}.jpg", "label": label, "split": "test"} | more


def write(folder, *rows):
    file = folder / "theirs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


ASKED = "USER:  \nWhat type of object is in this photo?\nASSISTANT: "
FORMS = {
    "local": (row(1, "rose", output=ASKED + "A rose.", pred="A rose."), "A rose."),
    "local, closed": (row(1, "rose", output=f'Q Choose one from "{LIST}". Answer: rose', pred="rose"), "rose"),
    "Mistral": (row(1, "rose", output="[INST] Q[/INST] A rose.", pred="[INST] Q[/INST] A rose."), "A rose."),
    "Gemini": (row(1, "rose", pred=" A rose."), "A rose."),
    "Claude": (row(1, "rose", question="What?", output="A rose."), "A rose."),
    "OpenAI": (row(1, "rose") | openai("A rose."), "A rose."),
    "OpenAI, batch": ({"custom_id": "flowers-7-rose", "response": {"status_code": 200, "body": openai("A rose.")}},
                      "A rose."),
    "OpenAI, a name with hyphens": ({"custom_id": "flowers-7-black-eyed susan-0"} | openai("no"), "no"),
    "OpenAI, no text": (row(1, "rose") | openai(None), ""),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form):
    line, answer = FORMS[form]
    way = CLOSED if "closed" in form else OPEN
    assert (
        import_run(write(tmp_path, line), tmp_path / "run", "gpt-4-turbo", "flowers", None, way, False)[0]
        == "1 answers"
    )
    record, (prediction,) = read_run(tmp_path / "run")
    assert prediction.output == answer and record["finished"] and record["config"]["imported"] == "theirs.jsonl"
    assert prediction.label == ("black-eyed susan" if "hyphens" in form else "rose")
    assert prediction.class_index == FLOWERS.index(prediction.label)
    assert prediction.choices == (FLOWERS if way is CLOSED else None)


def test_candidates_come_from_the_row_where_it_names_them(tmp_path):
    names = ["crane", "crane, bird", "box"]
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "own.jsonl").write_text('{"image": "a", "label": "box", "split": "test"}\n')
    question = 'Q Choose one from "box, crane, bird".'
    file = write(tmp_path, {"image": "a", "label": "box", "question": question, "output": "box"},
                 {"image": "b", "label": "crane", "choices": ["crane", "box"], "pred": "box"})  # fmt: skip
    way = Way("2", "random", "base")
    import_run(
        file, tmp_path / "run", "claude-3-opus", str(tmp_path / "own.jsonl"), tmp_path / "names.json", way, False
    )
    assert [p.choices for p in read_run(tmp_path / "run")[1]] == [("box", "crane, bird"), ("crane", "box")]


def test_the_script_imports_scores_and_tables(tmp_path, capsys):
    file = write(tmp_path, *[row(n, "rose", output="Q", pred="rose" if n < 6 else "tulip") for n in range(100)],
                 row(0, "rose", output="Q", pred="again"))  # fmt: skip
    words = ["main_results/table.py", "--outputs", tmp_path / "runs", "--import-file", file, "--model", "llava-1.5-7b",
             "--benchmark", "flowers"]  # fmt: skip
    done = run_script(*words)
    assert "100 answers; 1 rows about a picture that had one already are left out" in done.stderr
    assert "LLaVA1.5-7B (imported)" in done.stdout and "n=100 (5.9, +0.1, inside)" in done.stdout
    folder = tmp_path / "runs" / "llava-1.5-7b-flowers-open_world-imported-theirs"
    assert (folder / "scores.csv").exists() and "rose" in (folder / "classes.csv").read_text()
    before = (folder / "predictions.jsonl").read_bytes()
    assert run_script(*words).stdout == done.stdout and (folder / "predictions.jsonl").read_bytes() == before
    long = pd.read_csv(tmp_path / "runs" / "table1.csv").query("model == 'LLaVA1.5-7B (imported)'").set_index("metric")
    assert long.loc["accuracy", "paper"] == 5.9 and long.loc["no_class", "value"] == 94.0
    write(tmp_path, row(0, "rose", pred="rose"))  # the file has changed since
    wrong = run_script(*words, check=False)
    assert wrong.returncode == 1 and "holds another import" in wrong.stderr and "or rename" in wrong.stderr
    other = write(tmp_path, row(200, "rose", output="x \ud83d", pred="half \ud83d")).rename(tmp_path / "other.jsonl")
    words[words.index(file)] = other  # a second file of the same cell is a run of its own
    done = run_script(*words)
    assert "several runs: the one with the most examples" in done.stdout and "n=100 (5.9" in done.stdout


def test_what_the_manifest_says_is_compared(tmp_path, monkeypatch):
    """Without it everything is believed, and that is said."""
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    (tmp_path / "paths.toml").write_text('[benchmarks]\nflowers = "."\n')
    words = ("gpt-4-turbo", "flowers", None)
    file = write(tmp_path, row(1, "rose", pred="x"), row(2, "rose", pred="x"))
    said = import_run(file, tmp_path / "a", *words, OPEN, False)
    assert said[1:] == ["the manifest of Flowers102 is not there, so that pictures and labels are believed"]
    rows = [{"image": f"jpg/image_{n:05}.jpg", "label": "rose", "split": "test"} for n in (1, 3, 4)]
    (tmp_path / "flowers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    said = import_run(file, tmp_path / "b", *words, CLOSED, False)
    assert said[1:] == [
        "no row holds its question, so that --candidates all is believed",
        f"1 of the pictures are not in {tmp_path / 'flowers.jsonl'}",
        f"1 are in {tmp_path / 'flowers.jsonl'}, whose test split has 3",
    ]
    rows = [{"image": f"{kind}/img/0.jpg", "label": kind, "split": "test"} for kind in ("rose", "tree mallow")]
    (tmp_path / "flowers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    same = write(
        tmp_path, *[one | {"pred": "x"} for one in rows], {"image": "x/img/0.jpg", "label": "rose", "pred": ""}
    )
    said = import_run(same, tmp_path / "d", *words, OPEN, False)  # folder and name alone would not tell them apart
    assert said[1].startswith("1 of the pictures are not in") and said[2].startswith("2 are in")
    with pytest.raises(UserError, match="img/0.jpg has the label 'rose' in the imported file and 'tree mallow'"):
        import_run(write(tmp_path, rows[1] | {"label": "rose", "pred": "x"}), tmp_path / "c", *words, OPEN, False)
    (tmp_path / "flowers.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        import_run(same, tmp_path / "c", *words, OPEN, False)
    (tmp_path / "flowers.jsonl").write_text(json.dumps(row(1, "rose")) + "\n")
    wrong = write(tmp_path, row(1, "wallflower", pred="x"))
    with pytest.raises(UserError, match="image_00001.jpg has the label 'wallflower' .* and 'rose' in .*flowers.jsonl"):
        import_run(wrong, tmp_path / "c", *words, OPEN, False)
    (tmp_path / "paths.toml").write_text('[benchmark]\nflowers = "."\n')
    with pytest.raises(UserError, match="'benchmark', which nothing reads"):  # and not: the manifest is not there
        import_run(file, tmp_path / "c", *words, OPEN, False)
    assert not (tmp_path / "c").exists()


BAD = {
    "neither in 'label' nor": {"custom_id": "flowers-7-no flower"} | openai("x"),
    "has no answer": row(1, "rose", response=None, error={"code": "expired"}),
    "'tulip' is not in the class list, where '.*' is nearest": row(1, "tulip", pred="x"),
    "asked with 102 candidates, --candidates is none": row(
        1, "rose", question=f'Choose one from "{LIST}".', output="x"
    ),
    "has no answer, neither": row(1, "rose", choices=[{"message": {"content": ["parts"]}}]),
    "label_idx 3 is not the class 'rose'": row(1, "rose", pred="x", label_idx=3),
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_row_is_named(tmp_path, words):
    file = write(tmp_path, row(0, "rose", pred="x"), BAD[words])
    with pytest.raises(UserError, match=words) as caught:
        import_run(file, tmp_path / "run", "gpt-4-turbo", "flowers", None, OPEN, False)
    assert "theirs.jsonl row 2" in str(caught.value) and not (tmp_path / "run").exists()


def test_other_mistakes_are_named(tmp_path):
    module = script("main_results/table.py")

    def refuse(words, **options):
        with pytest.raises(UserError, match=words):
            module.main(module.Args(outputs=tmp_path / "runs", **options))

    file = write(tmp_path, row(0, "rose", pred="x"))
    refuse("needs --model and --benchmark", import_file=file)
    refuse("go with --import-file", model="llava-1.5-7b")
    known = {"import_file": file, "model": "llava-1.5-7b", "benchmark": "flowers"}
    refuse("llava7b is no key", **known | {"model": "llava7b"})
    refuse("CLIP always chooses", **known | {"model": "clip-vit-l-336"})
    refuse("absent.jsonl cannot be read", **known | {"import_file": tmp_path / "absent.jsonl"})
    refuse("has no modules.json", semantic=tmp_path)
    module.take_in(module.Args(outputs=tmp_path / "runs", **known | {"model": "meta/Other-7B"}))
    folder = tmp_path / "runs" / "meta-Other-7B-flowers-open_world-imported-theirs"
    assert read_run(folder)[0]["config"]["model"] == "meta-Other-7B"
    refuse("CLIP always chooses", **known | {"model": "ViT-L-14-336-quickgelu/openai"})
    for text, words in (("", "has no rows"), ("{", "row 1 is not JSON"), ("[]", "row 1 is not a JSON object")):
        file.write_text(text)
        refuse(words, **known)
