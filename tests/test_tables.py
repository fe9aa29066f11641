"""Protects: table cells: our value next to the paper's, missing cells are shown, miniatures are never compared."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from api_server import Server
from conftest import script
from PIL import Image

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import Prediction, UserError, to_line
from vlmclassifier.runs import open_run
from vlmclassifier.runs.record import FORMAT
from vlmclassifier.scoring.class_facts import real_labels
from vlmclassifier.scoring.runs import collect_runs, score_run
from vlmclassifier.tables import compare, markdown, metric_table, wide_table

PAPER = Path("main_results/paper.csv")
MODELS = list(pd.read_csv(PAPER)["model"].unique())
DATASETS = ["imagenet", "flowers", "cars", "caltech"]


CONFIG = {
    "model": "llava-1.5-7b", "kind": "vlm", "benchmark": "flowers", "classes": ["rose", "tulip"], "limit": None,
    "split": "test", "tags": [], **PromptSetting(("rose", "tulip")).config,
}  # fmt: skip


def make_run(folder: Path, hits: int, n: int, finish: bool = True, **changes) -> None:
    """A run of n rows of which the first `hits` are correct; without `finish` it stops after one batch."""
    config = CONFIG | changes
    ids = [f"{i}.jpg" for i in range(n)]
    run = open_run(folder, config, ids)
    for batch in run.pending(100):
        outputs = {i: "A rose." if int(i[:-4]) < hits else "" for i in batch}
        run.append([Prediction(i, "rose", 0, "Q", None, outputs[i], None) for i in batch])
        if not finish:
            run.locks.close()
            return
    run.finish()


def cell(outputs: Path, model: str, setting: str, dataset: str) -> str:
    """One cell of Table 1, made from the runs under `outputs`."""
    scores = collect_runs([outputs]).scores
    table = wide_table(compare(scores, PAPER, "table1"), DATASETS, MODELS).set_index(["model", "setting"])
    return table.loc[(model, setting), dataset]


def test_our_value_is_shown_with_the_papers(tmp_path):
    make_run(tmp_path / "a", 60, 1000)
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers") == "6.0 ±1.5 (5.9)"
    make_run(tmp_path / "b", 500, 1000, candidates="all")
    assert cell(tmp_path, "LLaVA1.5-7B", "closed_world", "flowers") == "50.0 ±3.1 (10.2*)"


def test_missing_cells_are_shown(tmp_path):
    make_run(tmp_path / "a", 60, 1000)
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "cars") == "missing (0.0)"
    assert cell(tmp_path, "GPT4", "closed_world", "imagenet") == "missing (60.6)"
    assert cell(tmp_path, "BLIP2-2.7B", "closed_world", "imagenet") == "N/A"


def test_miniature_is_tagged_and_never_compared(tmp_path):
    make_run(tmp_path / "a", 60, 1000, tags=["miniature"])
    assert cell(tmp_path, "LLaVA1.5-7B (miniature)", "open_world", "flowers") == "6.0 ±1.5"
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers") == "missing (5.9)"
    comparison = compare(collect_runs([tmp_path]).scores, PAPER, "table1")
    tagged = comparison[comparison["tags"] == "miniature"]
    assert len(tagged) == 8 and tagged["difference"].isna().all() and tagged["inside"].isna().all()


def test_different_split_is_tagged_and_never_compared(tmp_path):
    make_run(tmp_path / "a", 60, 1000, split="all", tags=["split all"])
    assert cell(tmp_path, "LLaVA1.5-7B (split all)", "open_world", "flowers") == "6.0 ±1.5"
    make_run(tmp_path / "b", 60, 1000, split="valid", tags=["miniature"], benchmark="imagenet")  # ImageNet's test split
    assert cell(tmp_path, "LLaVA1.5-7B (miniature)", "open_world", "imagenet") == "6.0 ±1.5"
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers") == "missing (5.9)"


def test_note_of_the_manifest_becomes_a_tag_and_is_never_compared(tmp_path):
    """The note passes from the manifest through a run of classify_api.py into the table."""
    Image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    row = {"image": "0.png", "label": "ant", "split": "test", "note": "not the paper's split"}
    other = {"image": "1.png", "label": "bass", "split": "train", "note": "another"}  # of a split that is not used
    (tmp_path / "caltech.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    assert load_evaluation("caltech", root=tmp_path).tags == ("1 of 4,331 images", "not the paper's split")
    module = script("main_results/classify_api.py")
    with Server(lambda image, call: "ok") as server:
        module.main(module.Args(model="gpt-4-turbo", base_url=f"{server.url}/v1", benchmark="caltech",
                                data_root=tmp_path, out=tmp_path / "runs" / "a"))  # fmt: skip
    name = f"GPT4 (1 of 4,331 images, not the paper's split, at {server.url[7:]})"
    assert cell(tmp_path / "runs", name, "open_world", "caltech").startswith("0.0 ±")
    assert cell(tmp_path / "runs", "GPT4", "open_world", "caltech") == "missing (61.0)"


def test_imported_runs_are_compared_with_the_papers_value(tmp_path):
    make_run(tmp_path / "ours", 100, 1000)
    make_run(tmp_path / "imported", 60, 1000, tags=["imported"])
    assert cell(tmp_path, "LLaVA1.5-7B", "open_world", "flowers").endswith("(5.9*)")
    assert cell(tmp_path, "LLaVA1.5-7B (imported)", "open_world", "flowers").endswith("(5.9)")
    assert cell(tmp_path, "LLaVA1.5-7B (imported)", "open_world", "cars") == "N/A"  # no imported run of this benchmark
    make_run(tmp_path / "part", 60, 1000, split="train", tags=["split train", "imported"])
    assert cell(tmp_path, "LLaVA1.5-7B (split train, imported)", "open_world", "flowers") == "6.0 ±1.5"


def test_metric_over_fewer_images_reports_its_count(tmp_path):
    names = list(class_names(BENCHMARKS["imagenet"]))
    make_run(tmp_path / "a", 0, 3, benchmark="imagenet", split="valid", classes=names)
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    labeled = next(name for name, classes in real_labels().items() if classes)
    rows = [Prediction(i, names[0], 0, "Q", None, "x", None) for i in (f"{labeled}.JPEG", "a.jpg", "b.jpg")]
    (tmp_path / "a" / "predictions.jsonl").write_text("".join(to_line(row) for row in rows))
    assert run["rows"] == len(rows)
    table = metric_table(compare(collect_runs([tmp_path]).scores, PAPER, "table1"), ("contains", "real"))
    assert table[["n", "contains", "real", "n of real"]].to_numpy().tolist() == [[3, 0.0, 0.0, "1"]]


def test_table_8_counts_synonyms(tmp_path, capsys):
    names = list(class_names(BENCHMARKS["imagenet"]))
    config = CONFIG | {"model": "blip2-2.7b", "benchmark": "imagenet", "classes": names, "split": "valid"}
    # one correct output, two synonyms of the class name, one wrong output
    outputs = ["an electric ray", "a numbfish", "a numbfish", "a stingray"]
    run = open_run(tmp_path / "a", config, [str(i) for i in range(4)])
    run.append([Prediction(str(i), names[5], 5, "Q", None, output, None) for i, output in enumerate(outputs)])
    run.finish()
    module = script("main_results/table.py")
    module.main(module.Args(outputs=tmp_path, all=True))
    table8 = (tmp_path / "table8.md").read_text()
    row = next(line for line in table8.splitlines() if "BLIP2" in line)
    assert "25.0 ±" in row and "(25.3)" in row and "75.0 ±" in row and "(27.8*)" in row
    line = next(line for line in capsys.readouterr().out.splitlines() if "contains_synonym" in line and "num" in line)
    assert [value.strip() for value in line.split("|")[1:6]] == ["open_world", "contains_synonym", "4", "0", ""]
    assert '"a numbfish" for electric ray' in (tmp_path / "metrics.md").read_text()
    published = pd.read_csv(PAPER).query("table == 'table8'")["value"]
    assert len(published) == 20 and all(f"({value:.1f}" in table8 for value in published)


def test_every_value_of_the_paper_is_shown(tmp_path):
    table = wide_table(compare([], PAPER, "table1"), DATASETS, MODELS)
    values = sorted(float(text[9:-1]) for text in table[DATASETS].to_numpy().ravel() if text != "N/A")
    published = pd.read_csv(PAPER).query("table == 'table1'")["value"]
    assert values == sorted(published) and len(values) == 79
    assert list(table["model"])[:2] == MODELS[:2]


def test_largest_of_several_runs_counts_and_the_others_are_noted(tmp_path):
    make_run(tmp_path / "small", 10, 10)
    make_run(tmp_path / "large", 0, 100, limit=100)
    make_run(tmp_path / "unfinished", 200, 200, finish=False)
    collected = collect_runs([tmp_path])
    notes = collected.notes
    assert {score.n for score in collected.scores} == {100}
    assert any("its 200 rows" in note for note in notes)
    assert len(notes) == 2 and "several runs" in notes[0] + notes[1] and "unfinished" in notes[0] + notes[1]


def test_script_writes_the_same_values_in_three_formats(tmp_path, capsys):
    make_run(tmp_path / "a", 60, 1000)
    make_run(tmp_path / "other-table", 60, 1000, candidates="2")
    module = script("main_results/table.py")
    module.main(module.Args(outputs=tmp_path))
    printed = capsys.readouterr().out
    first, others = printed.split("Runs with other settings")
    assert "6.0 ±1.5 (5.9)" in first and "GPT4" not in first
    assert (
        "1 of the paper's 79 cells are run, 1 of them with its number inside our interval." in first
        and "2_classes" not in first
    )
    assert "| LLaVA1.5-7B | 2_classes | flowers" in others  # every finished run is in some table
    assert "nan" not in printed
    long = pd.read_csv(tmp_path / "table1.csv")
    row = long[(long["model"] == "LLaVA1.5-7B") & (long["dataset"] == "flowers") & (long["metric"] == "accuracy")]
    assert row[row["setting"] == "open_world"][["value", "paper", "n"]].to_numpy().tolist() == [[6.0, 5.9, 1000]]
    latex = (tmp_path / "table1.tex").read_text()
    assert r"6.0 $\pm$ 1.5 (5.9)" in latex and r"\toprule" in latex and "open world" in latex and "_" not in latex
    assert markdown(pd.DataFrame({"a": [1.0, None]})).splitlines()[-1].strip("| ") == ""
    module.main(module.Args(outputs=tmp_path, format="latex"))
    assert capsys.readouterr().out.startswith("\\begin{tabular}")


def test_missing_unfinished_and_broken_runs_are_reported(tmp_path):
    module = script("main_results/table.py")
    with pytest.raises(UserError, match="No finished run"):
        module.main(module.Args(outputs=tmp_path / "absent"))
    assert not (tmp_path / "absent").exists()
    open_run(tmp_path / "begun", {"model": "x"}, ["a"])
    with pytest.raises(UserError, match="Note: begun is unfinished: .* or remove the folder"):
        module.main(module.Args(outputs=tmp_path))
    run = open_run(tmp_path / "begun", {"model": "x"}, ["a", "b"])
    run.append([Prediction("a", "cat", 0, "", None, "cat", None)])  # in a part file, as after a kill before the merge
    with pytest.raises(UserError, match="Note: begun is unfinished: repeat its command to finish its 2 rows[.]$"):
        module.main(module.Args(outputs=tmp_path))
    run.finish()
    shutil.rmtree(tmp_path / "begun")
    make_run(tmp_path / "a", 6, 10)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    del record["config"]["kind"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="run.json is not a finished run"):
        collect_runs([tmp_path])


def test_scores_csv_has_every_score(tmp_path):
    make_run(tmp_path, 60, 1000)
    score_run(tmp_path)
    rows = pd.read_csv(tmp_path / "scores.csv")
    assert list(rows.columns) == ["model", "setting", "dataset", "metric", "value", "low", "high", "n", "tags"]
    assert list(rows["metric"]) == [
        "accuracy", "mean_per_class", "contains", "exact", "empty", "contains_words", "unique", "no_class"
    ]  # fmt: skip
    classes = pd.read_csv(tmp_path / "classes.csv")
    assert classes.to_numpy()[0].tolist() == [0, "rose", 1000, 60, 6.0, *rows.loc[0, ["low", "high"]]]
    assert len(classes) == 1  # a class without images has no accuracy
    values = rows.set_index("metric")["value"]
    assert values[["accuracy", "contains", "exact", "empty"]].tolist() == pytest.approx([6.0, 6.0, 0.0, 94.0])


def test_not_applicable_cell_is_not_missing(tmp_path):
    """Only the cell of the run is N/A, with the paper's value in parentheses; other models get a row of their own."""
    config = CONFIG | {"model": "instructblip-7b", "candidates": "all"}
    configs = {"a": config, "b": config | {"model": "qwen3-vl-8b", "benchmark": "cars"}}
    for name, run_config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(
            json.dumps({"format": FORMAT, "config": run_config, "not_applicable": "too long"})
        )
    not_applicable = collect_runs([tmp_path]).not_applicable
    assert not_applicable == {("IBLIP-7B", "closed_world", "flowers", ()), ("qwen3-vl-8b", "closed_world", "cars", ())}
    table = wide_table(compare([], PAPER, "table1"), DATASETS, MODELS, not_applicable).set_index(["model", "setting"])
    assert table.loc[("IBLIP-7B", "closed_world"), "flowers"] == "N/A (26.8)"
    assert table.loc[("IBLIP-7B", "closed_world"), "caltech"].startswith("missing (")
    assert table.loc[("qwen3-vl-8b", "closed_world"), "cars"] == "N/A"
