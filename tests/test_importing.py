"""Protects: output files of the paper's own code, in every format, become runs that are scored like ours."""

import json

import pandas as pd
import pytest
from conftest import run_script, script

from vlmclassifier.benchmarks import BENCHMARKS, class_names, find_benchmark
from vlmclassifier.importing import find_imported_model
from vlmclassifier.importing import import_run as import_spec
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

FLOWERS = class_names(BENCHMARKS["flowers"])
OPEN, CLOSED = PromptSetting(FLOWERS), PromptSetting(FLOWERS, "all")
NAMES = ", ".join(FLOWERS)


def import_run(file, folder, model, benchmark, classes, setting) -> list[str]:
    return import_spec(file, folder, find_imported_model(model), find_benchmark(benchmark, classes), setting)


def openai_body(text: str) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def row(number: int, label: str, **fields) -> dict:
    return {"image": f"./data/Flowers102/jpg/image_{number:05}.jpg", "label": label, "split": "test"} | fields


def write(folder, *rows):
    file = folder / "theirs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


PROMPT = "USER:  \nWhat type of object is in this photo?\nASSISTANT: "
FORMATS = {
    "local": (row(1, "rose", output=PROMPT + "A rose.", pred="A rose."), "A rose."),
    "local, closed": (row(1, "rose", output=f'Q Choose one from "{NAMES}". Answer: rose', pred="rose"), "rose"),
    "Mistral": (row(1, "rose", output="[INST] Q[/INST] A rose.", pred="[INST] Q[/INST] A rose."), "A rose."),
    "Gemini": (row(1, "rose", pred=" A rose."), "A rose."),
    "Claude": (row(1, "rose", question="What?", output="A rose."), "A rose."),
    "OpenAI": (row(1, "rose") | openai_body("A rose."), "A rose."),
    "OpenAI, batch": ({"custom_id": "flowers-7-rose", "response": {"status_code": 200, "body": openai_body("A rose.")}},
                      "A rose."),
    "OpenAI, a name with hyphens": ({"custom_id": "flowers-7-black-eyed susan-0"} | openai_body("no"), "no"),
    "OpenAI, no text": (row(1, "rose") | openai_body(None), ""),
}  # fmt: skip


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_file_format_is_read(tmp_path, file_format):
    line, answer = FORMATS[file_format]
    setting = CLOSED if "closed" in file_format else OPEN
    messages = import_run(write(tmp_path, line), tmp_path / "run", "gpt-4-turbo", "flowers", None, setting)
    assert messages[0] == "1 answers"
    record, (prediction,) = read_run(tmp_path / "run")
    assert prediction.output == answer and record["finished"] and record["config"]["imported"] == "theirs.jsonl"
    assert prediction.label == ("black-eyed susan" if "hyphens" in file_format else "rose")
    assert prediction.class_index == FLOWERS.index(prediction.label)
    assert prediction.choices == (FLOWERS if setting is CLOSED else None)


def test_candidates_are_read_from_the_row(tmp_path):
    names = ["crane", "crane, bird", "box"]
    (tmp_path / "names.json").write_text(json.dumps(names))
    (tmp_path / "own.jsonl").write_text('{"image": "a", "label": "box", "split": "test"}\n')
    question = 'Q Choose one from "box, crane, bird".'
    file = write(tmp_path, {"image": "a", "label": "box", "question": question, "output": "box"},
                 {"image": "b", "label": "crane", "choices": ["crane", "box"], "pred": "box"})  # fmt: skip
    setting = PromptSetting(tuple(names), "2")
    import_run(file, tmp_path / "run", "claude-3-opus", str(tmp_path / "own.jsonl"), tmp_path / "names.json", setting)
    assert [p.choices for p in read_run(tmp_path / "run")[1]] == [("box", "crane, bird"), ("crane", "box")]


def test_script_imports_and_scores_and_the_table_shows_the_run(tmp_path, capsys):
    file = write(tmp_path, *[row(n, "rose", output="Q", pred="rose" if n < 6 else "tulip") for n in range(100)],
                 row(0, "rose", output="Q", pred="again"))  # fmt: skip
    command = ["main_results/import_outputs.py", file, "--outputs", tmp_path / "runs", "--model", "llava-1.5-7b",
               "--benchmark", "flowers"]  # fmt: skip
    first = run_script(*command)
    assert "100 answers; 1 rows about an image that had one already are left out" in first.stdout
    table = ["main_results/table.py", "--outputs", tmp_path / "runs"]
    printed = run_script(*table).stdout
    assert "LLaVA1.5-7B (imported)" in printed and "(5.9)" in printed
    folder = tmp_path / "runs" / "llava-1.5-7b-flowers-open_world-imported-theirs"
    assert (folder / "scores.csv").exists() and "rose" in (folder / "classes.csv").read_text()
    before = (folder / "predictions.jsonl").read_bytes()
    assert run_script(*command).stdout == first.stdout and (folder / "predictions.jsonl").read_bytes() == before
    scores = pd.read_csv(tmp_path / "runs" / "table1.csv").query("tags == 'imported'").set_index("metric")
    assert scores.loc["accuracy", "paper"] == 5.9 and scores.loc["no_class", "value"] == 94.0
    write(tmp_path, row(0, "rose", pred="rose"))  # the file changed after the import
    refused = run_script(*command, check=False)
    assert refused.returncode == 1 and "holds another import" in refused.stderr and "or rename" in refused.stderr
    other = write(tmp_path, row(200, "rose", output="x \ud83d", pred="half \ud83d")).rename(tmp_path / "other.jsonl")
    command[command.index(file)] = other  # a second file of the same cell becomes a separate run
    run_script(*command)
    printed = run_script(*table).stdout
    assert "several runs: the one with the most examples" in printed and "(5.9)" in printed


def test_imported_rows_are_compared_with_the_manifest(tmp_path, monkeypatch):
    """Without a manifest nothing is compared, and a message says so."""
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    (tmp_path / "paths.toml").write_text('[benchmarks]\nflowers = "."\n')
    cell = ("gpt-4-turbo", "flowers", None)
    file = write(tmp_path, row(1, "rose", pred="x"), row(2, "rose", pred="x"))
    messages = import_run(file, tmp_path / "a", *cell, OPEN)
    assert messages[1:] == ["the manifest of Flowers102 is missing, so images and labels are taken on trust"]
    rows = [{"image": f"jpg/image_{n:05}.jpg", "label": "rose", "split": "test"} for n in (1, 3, 4)]
    (tmp_path / "flowers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = import_run(file, tmp_path / "b", *cell, CLOSED)
    assert messages[1:] == [
        "no row holds its question, so --candidates all is taken on trust",
        f"1 of the images are not in {tmp_path / 'flowers.jsonl'}",
        f"1 are in {tmp_path / 'flowers.jsonl'}, whose test split has 3",
    ]
    rows = [{"image": f"{kind}/img/0.jpg", "label": kind, "split": "test"} for kind in ("rose", "tree mallow")]
    (tmp_path / "flowers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    same_names = [row | {"pred": "x"} for row in rows] + [{"image": "x/img/0.jpg", "label": "rose", "pred": ""}]
    same = write(tmp_path, *same_names)
    messages = import_run(same, tmp_path / "d", *cell, OPEN)  # folder and file name alone are ambiguous
    assert messages[1].startswith("1 of the images are not in") and messages[2].startswith("2 are in")
    with pytest.raises(UserError, match="img/0.jpg has the label 'rose' in the imported file and 'tree mallow'"):
        import_run(write(tmp_path, rows[1] | {"label": "rose", "pred": "x"}), tmp_path / "c", *cell, OPEN)
    (tmp_path / "flowers.jsonl").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        import_run(same, tmp_path / "c", *cell, OPEN)
    (tmp_path / "flowers.jsonl").write_text(json.dumps(row(1, "rose")) + "\n")
    other_label = write(tmp_path, row(1, "wallflower", pred="x"))
    with pytest.raises(UserError, match="image_00001.jpg has the label 'wallflower' .* and 'rose' in .*flowers.jsonl"):
        import_run(other_label, tmp_path / "c", *cell, OPEN)
    (tmp_path / "paths.toml").write_text('[benchmark]\nflowers = "."\n')
    with pytest.raises(UserError, match="'benchmark', which nothing reads"):  # not the message about a missing manifest
        import_run(file, tmp_path / "c", *cell, OPEN)
    assert not (tmp_path / "c").exists()


BAD_ROWS = {
    "neither in 'label' nor": {"custom_id": "flowers-7-no flower"} | openai_body("x"),
    "has no answer": row(1, "rose", response=None, error={"code": "expired"}),
    "'tulip' is not in the class list, where '.*' is nearest": row(1, "tulip", pred="x"),
    "lists 102 candidates, --candidates is none": row(1, "rose", question=f'Choose one from "{NAMES}".', output="x"),
    "has no answer, neither": row(1, "rose", choices=[{"message": {"content": ["parts"]}}]),
    "label_idx 3 is not the class 'rose'": row(1, "rose", pred="x", label_idx=3),
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_row_is_reported_with_its_number(tmp_path, message):
    file = write(tmp_path, row(0, "rose", pred="x"), BAD_ROWS[message])
    with pytest.raises(UserError, match=message) as caught:
        import_run(file, tmp_path / "run", "gpt-4-turbo", "flowers", None, OPEN)
    assert "theirs.jsonl row 2" in str(caught.value) and not (tmp_path / "run").exists()


def test_other_user_errors_are_reported(tmp_path):
    module, table = script("main_results/import_outputs.py"), script("main_results/table.py")
    file = write(tmp_path, row(0, "rose", pred="x"))
    defaults = {"file": file, "model": "llava-1.5-7b", "benchmark": "flowers", "outputs": tmp_path / "runs"}

    def check_refused(message, **options):
        with pytest.raises(UserError, match=message):
            module.main(module.Args(**(defaults | options)))

    check_refused("llava7b is no key", model="llava7b")
    check_refused("CLIP always chooses", model="clip-vit-l-336")
    check_refused("absent.jsonl cannot be read", file=tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="has no modules.json"):
        table.main(table.Args(outputs=tmp_path / "runs", semantic=tmp_path))
    module.main(module.Args(**defaults | {"model": "meta/Other-7B"}))
    folder = tmp_path / "runs" / "meta-Other-7B-flowers-open_world-imported-theirs"
    assert read_run(folder)[0]["config"]["model"] == "meta-Other-7B"
    check_refused("CLIP always chooses", model="ViT-L-14-336-quickgelu/openai")
    for text, message in (("", "has no rows"), ("{", "row 1 is not JSON"), ("[]", "row 1 is not a JSON object")):
        file.write_text(text)
        check_refused(message)
