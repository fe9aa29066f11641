"""Protects: the cell of a table: ours beside the paper's, missing cells visible, miniatures never compared."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from api_server import Server
from conftest import script
from PIL import Image

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.records import Prediction, UserError, to_line
from vlmclassifier.runs import open_run
from vlmclassifier.scoring.special import real_labels
from vlmclassifier.tables import collect_scores, compare, details, markdown, not_applicable, wide_table, write_scores

PAPER = Path("main_results/paper.csv")
MODELS = list(pd.read_csv(PAPER)["model"].unique())
DATASETS = ["imagenet", "flowers", "cars", "caltech"]


def make_run(folder: Path, hits: int, n: int, finish: bool = True, **changes) -> None:
    """A finished run of n rows of which `hits` are right."""
    config = {
        "model": "llava-1.5-7b", "kind": "vlm", "miniature": False, "benchmark": "flowers", "candidates": "none",
        "classes": ["rose", "tulip"], "limit": None, "split": "test",
    } | changes  # fmt: skip
    ids = [f"{i}.jpg" for i in range(n)]
    run = open_run(folder, config, ids)
    for batch in run.pending(100):
        outputs = {i: "A rose." if int(i[:-4]) < hits else "" for i in batch}
        run.append([Prediction(i, "rose", 0, "Q", None, outputs[i], None, None) for i in batch])
        if not finish:
            run._locks.close()
            return
    run.finish()


def cell(outputs: Path, model: str, setting: str, dataset: str) -> str:
    scores, _ = collect_scores(outputs, "main_results", "table1")
    table = wide_table(compare(scores, PAPER, "table1"), DATASETS, MODELS).set_index(["model", "setting"])
    return table.loc[(model, setting), dataset]


def test_ours_beside_the_papers(tmp_path):
    make_run(tmp_path / "a", 60, 1000)
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers") == "6.0 [4.7, 7.6] n=1000 (5.9, +0.1, inside)"
    make_run(tmp_path / "b", 500, 1000, candidates="all")
    assert cell(tmp_path, "LLaVA1.5-7B", "closed_world", "flowers") == "50.0 [46.9, 53.1] n=1000 (10.2, +39.8, outside)"


def test_missing_cells_stay_visible(tmp_path):
    make_run(tmp_path / "a", 60, 1000)
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "cars") == "missing (0.0)"
    assert cell(tmp_path, "GPT4", "closed_world", "imagenet") == "missing (60.6)"
    assert cell(tmp_path, "BLIP2-2.7B", "closed_world", "imagenet") == "N/A"


def test_a_miniature_is_marked_and_never_compared(tmp_path):
    make_run(tmp_path / "a", 60, 1000, miniature=True)
    assert cell(tmp_path, "LLaVA1.5-7B (miniature)", "open_world", "flowers") == "6.0 [4.7, 7.6] n=1000"
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers") == "missing (5.9)"
    comparison = compare(collect_scores(tmp_path, "main_results", "table1")[0], PAPER, "table1")
    marked = comparison[comparison["model"].str.contains("miniature")]
    assert len(marked) == 8 and marked["difference"].isna().all() and marked["inside"].isna().all()


def test_another_split_is_marked_and_never_compared(tmp_path):
    make_run(tmp_path / "a", 60, 1000, split="all")
    assert cell(tmp_path, "LLaVA1.5-7B (split all)", "open_world", "flowers") == "6.0 [4.7, 7.6] n=1000"
    make_run(tmp_path / "b", 60, 1000, split="valid", miniature=True, benchmark="imagenet")  # ImageNet's test split
    assert cell(tmp_path, "LLaVA1.5-7B (miniature)", "open_world", "imagenet") == "6.0 [4.7, 7.6] n=1000"
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers") == "missing (5.9)"


def test_a_split_that_is_not_the_papers_is_marked_and_never_compared(tmp_path):
    """From the manifest's note through a run of the user's script to the table."""
    Image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    row = {"image": "0.png", "label": "ant", "split": "test", "note": "not the paper's split"}
    other = {"image": "1.png", "label": "bass", "split": "train", "note": "another"}  # of a split that is not asked for
    (tmp_path / "caltech.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    assert load_evaluation("caltech", root=tmp_path).marks == {"note": "not the paper's split"}
    module = script("main_results/classify_api.py")
    with Server(lambda picture, call: "ok") as server:
        module.main(module.Args(model="gpt-4-turbo", base_url=f"{server.url}/v1", benchmark="caltech",
                                data_root=tmp_path, out=tmp_path / "runs" / "a"))  # fmt: skip
    name = f"GPT4 (not the paper's split, at {server.url[7:]})"
    assert cell(tmp_path / "runs", name, "open_world", "caltech").endswith("n=1")
    assert cell(tmp_path / "runs", "GPT4", "open_world", "caltech") == "missing (61.0)"


def test_imported_answers_stand_beside_the_papers_number(tmp_path):
    make_run(tmp_path / "ours", 100, 1000)
    make_run(tmp_path / "theirs", 60, 1000, imported="flowers_llava7b.jsonl")
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers").endswith("(5.9, +4.1, outside)")
    assert cell(tmp_path, "LLaVA1.5-7B (imported)", "open_world", "flowers").endswith("(5.9, +0.1, inside)")
    assert cell(tmp_path, "LLaVA1.5-7B (imported)", "open_world", "cars") == "N/A"  # nothing was imported there
    make_run(tmp_path / "part", 60, 1000, imported="x", split="train")  # another split is not the paper's cell
    assert cell(tmp_path, "LLaVA1.5-7B (split train, imported)", "open_world", "flowers") == "6.0 [4.7, 7.6] n=1000"


def test_a_metric_that_counts_fewer_pictures_says_how_many(tmp_path):
    names = list(class_names(BENCHMARKS["imagenet"]))
    make_run(tmp_path / "a", 0, 3, benchmark="imagenet", split="valid", classes=names)
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    file = next(name for name, classes in real_labels().items() if classes)
    rows = [Prediction(i, names[0], 0, "Q", None, "x", None, None) for i in (f"{file}.JPEG", "a.jpg", "b.jpg")]
    (tmp_path / "a" / "predictions.jsonl").write_text("".join(map(to_line, rows)))
    assert run["rows"] == len(rows)
    table = details(compare(collect_scores(tmp_path, "m", "t")[0], PAPER, "table1"), ("contains", "real"))
    assert table[["n", "contains", "real", "n of real"]].to_numpy().tolist() == [[3, 0.0, 0.0, "1"]]


def test_table_8_counts_synonyms(tmp_path, capsys):
    names = list(class_names(BENCHMARKS["imagenet"]))
    config = {"model": "blip2-2.7b", "kind": "vlm", "miniature": False, "benchmark": "imagenet", "candidates": "none",
              "classes": names, "split": "valid"}  # fmt: skip
    outputs = ["an electric ray"] + ["a numbfish"] * 2 + ["a stingray"]  # one right, two by another name of the class
    run = open_run(tmp_path / "a", config, [str(i) for i in range(4)])
    run.append([Prediction(str(i), names[5], 5, "Q", None, said, None, None) for i, said in enumerate(outputs)])
    run.finish()
    module = script("main_results/table.py")
    module.main(module.Args(outputs=tmp_path))
    row = next(line for line in (tmp_path / "table8.md").read_text().splitlines() if "BLIP2" in line)
    assert "25.0 [" in row and "(25.3, -0.3, inside)" in row and "75.0 [" in row and "(27.8, +47.2, outside)" in row
    line = next(line for line in capsys.readouterr().out.splitlines() if "contains_synonym" in line and "num" in line)
    assert [cell.strip() for cell in line.split("|")[1:6]] == ["open_world", "contains_synonym", "4", "0", ""]
    assert '"a numbfish" for electric ray' in (tmp_path / "metrics.md").read_text()
    shown = (tmp_path / "table8.md").read_text()
    published = pd.read_csv(PAPER).query("table == 'table8'")["value"]
    assert len(published) == 20 and all(f"({value:.1f}" in shown for value in published)


def test_every_number_of_the_paper_appears(tmp_path):
    table = wide_table(compare([], PAPER, "table1"), DATASETS, MODELS)
    shown = sorted(float(c[9:-1]) for c in table[DATASETS].to_numpy().ravel() if c != "N/A")
    published = pd.read_csv(PAPER).query("table == 'table1'")["value"]
    assert shown == sorted(published) and len(shown) == 79
    assert list(table["model"])[:2] == MODELS[:2]


def test_of_several_runs_the_largest_counts_and_the_others_are_noted(tmp_path):
    make_run(tmp_path / "small", 10, 10)
    make_run(tmp_path / "large", 0, 100, limit=100)
    make_run(tmp_path / "unfinished", 200, 200, finish=False)
    scores, notes = collect_scores(tmp_path, "main_results", "table1")
    assert {score.n for score in scores} == {100}
    assert any("its 200 rows" in note for note in notes)
    assert len(notes) == 2 and "several runs" in notes[0] + notes[1] and "unfinished" in notes[0] + notes[1]


def test_the_script_writes_three_forms_that_agree(tmp_path, capsys):
    make_run(tmp_path / "a", 60, 1000)
    make_run(tmp_path / "other-table", 60, 1000, candidates="20")
    main, args = script("main_results/table.py").main, script("main_results/table.py").Args
    main(args(outputs=tmp_path))
    printed = capsys.readouterr().out
    assert "6.0 [4.7, 7.6] n=1000 (5.9, +0.1, inside)" in printed and "20_classes" not in printed
    assert "nan" not in printed
    long = pd.read_csv(tmp_path / "table1.csv")
    row = long[(long["model"] == "LLaVA1.5-7B") & (long["dataset"] == "flowers") & (long["metric"] == "accuracy")]
    assert row[row["setting"] == "open_world"][["value", "paper", "n"]].to_numpy().tolist() == [[6.0, 5.9, 1000]]
    assert "6.0 [4.7, 7.6] n=1000 (5.9, +0.1, inside)" in (tmp_path / "table1.tex").read_text()
    assert markdown(pd.DataFrame({"a": [1.0, None]})).splitlines()[-1].strip("| ") == ""
    main(args(outputs=tmp_path, format="latex"))
    assert capsys.readouterr().out.startswith("\\begin{tabular}")


def test_no_runs_or_broken_runs_end_in_a_sentence(tmp_path):
    module = script("main_results/table.py")
    with pytest.raises(UserError, match="No finished run"):
        module.main(module.Args(outputs=tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()
    open_run(tmp_path / "begun", {"model": "x"}, ["a"])
    with pytest.raises(UserError, match="Note: begun is unfinished: .* or remove the folder"):
        module.main(module.Args(outputs=tmp_path))
    run = open_run(tmp_path / "begun", {"model": "x"}, ["a", "b"])
    run.append([Prediction("a", "cat", 0, "", None, "cat", None, None)])  # in a part file: killed before the merge
    with pytest.raises(UserError, match="Note: begun is unfinished: repeat its command to finish its 2 rows[.]$"):
        module.main(module.Args(outputs=tmp_path))
    run.finish()
    shutil.rmtree(tmp_path / "begun")
    make_run(tmp_path / "a", 6, 10)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    del record["config"]["kind"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="run.json is not a finished run"):
        collect_scores(tmp_path, "main_results", "table1")


def test_scores_csv_holds_the_records(tmp_path):
    make_run(tmp_path, 60, 1000)
    write_scores(tmp_path, "main_results", "table1")
    rows = pd.read_csv(tmp_path / "scores.csv")
    assert list(rows.columns[:6]) == ["section", "table", "model", "setting", "dataset", "metric"]
    assert list(rows["metric"]) == [
        "accuracy", "mean_per_class", "contains", "exact", "empty", "contains_words", "unique", "no_class"
    ]  # fmt: skip
    classes = pd.read_csv(tmp_path / "classes.csv")
    assert classes.to_numpy()[0].tolist() == [0, "rose", 1000, 60, 6.0, *rows.loc[0, ["low", "high"]]]
    assert len(classes) == 1  # a class without pictures has no accuracy
    values = rows.set_index("metric")["value"]
    assert values[["accuracy", "contains", "exact", "empty"]].tolist() == pytest.approx([6.0, 6.0, 0.0, 94.0])


def test_a_question_that_does_not_fit_is_not_missing(tmp_path):
    """N/A with the paper's number beside it, for the cell alone; a row of its own where the paper has none."""
    config = {"model": "instructblip-7b", "miniature": False, "split": "test", "benchmark": "flowers",
              "candidates": "all", "kind": "vlm", "classes": []}  # fmt: skip
    cells = {"a": config, "b": config | {"model": "qwen3-vl-8b", "benchmark": "cars"}}
    for name, one in cells.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"config": one, "not_applicable": "too long"}))
    absent = not_applicable(tmp_path)
    assert absent == {("IBLIP-7B", "closed_world", "flowers"), ("qwen3-vl-8b", "closed_world", "cars")}
    table = wide_table(compare([], PAPER, "table1"), DATASETS, MODELS, absent).set_index(["model", "setting"])
    assert table.loc[("IBLIP-7B", "closed_world"), "flowers"] == "N/A (26.8)"
    assert table.loc[("IBLIP-7B", "closed_world"), "caltech"].startswith("missing (")
    assert table.loc[("qwen3-vl-8b", "closed_world"), "cars"] == "N/A"
