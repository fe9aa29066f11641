"""Protects: a benchmark, a metric and a model are each added by one entry, and appear in runs, tables and launchers."""

import json

import pandas as pd
import pytest
from conftest import script
from PIL import Image

from vlmclassifier.arguments import run_config
from vlmclassifier.benchmarks import BENCHMARKS, Benchmark, load_evaluation
from vlmclassifier.class_lists import JsonList
from vlmclassifier.models import MODELS, ModelSpec
from vlmclassifier.runs import OldFormatError, open_run, read_record
from vlmclassifier.scoring.metrics import METRICS, Metric
from vlmclassifier.scoring.runs import collect_runs, score_run


@pytest.fixture
def pets(tmp_path, monkeypatch) -> Benchmark:
    """A new benchmark, by one entry in the registry, with three images."""
    (tmp_path / "pets.json").write_text('["cat", "dog"]')
    rows = [{"image": f"{i}.png", "label": ["cat", "dog"][i % 2], "split": "test"} for i in range(3)]
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        Image.new("RGB", (30, 20), (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    benchmark = Benchmark("pets", "OxfordPets", JsonList(tmp_path / "pets.json"))
    monkeypatch.setitem(BENCHMARKS, "pets", benchmark)
    return benchmark


def classify(kind, key, weights, outputs, data_root, **more) -> None:
    module = script(f"main_results/classify_{kind}.py")
    out = outputs / f"{kind}-run"
    module.main(module.Args(key, weights, **{"benchmark": "pets", "data_root": data_root, "out": out} | more))


def table1(outputs) -> pd.DataFrame:
    """Table 1 by its script: the long form."""
    module = script("main_results/table.py")
    module.main(module.Args(outputs=outputs))
    return pd.read_csv(outputs / "table1.csv").fillna({"tags": ""})


def listed(**filters) -> list[str]:
    """What the launchers read."""
    module = script("scripts/list_registry.py")
    return module.keys(module.Args(**filters))


def test_a_new_benchmark_is_one_entry(pets, tiny, tmp_path, capsys):
    classify("vlm", "llava-1.5-7b", tiny / "llava-1.5-7b", tmp_path / "runs", tmp_path, max_new_tokens=4)
    table = table1(tmp_path / "runs")
    assert set(table.loc[table["tags"] == "miniature, 4 tokens", "dataset"]) == {"pets"}
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| model"))
    assert [cell.strip() for cell in shown.split("|")[3:-1]] == ["pets"]  # not the paper's, which were not run
    assert "pets" in listed(keys="benchmarks") and "pets" not in listed(keys="benchmarks", paper=True)


def test_a_new_metric_is_one_entry(own, tiny, tmp_path, monkeypatch, capsys):
    args = {**own.args, "max_new_tokens": 4}
    classify("vlm", "llava-1.5-7b", tiny / "llava-1.5-7b", tmp_path / "runs", None, **args)
    module = script("scripts/list_registry.py")
    metric = Metric(
        "long_answer", "the answer has more than five letters",
        lambda answers: [len(prediction.output) > 5 for prediction in answers.predictions],
        lambda answers: answers.is_text, judges=True,
    )  # fmt: skip
    monkeypatch.setitem(METRICS, "long_answer", metric)
    table = table1(tmp_path / "runs")  # the stored scores of the run name other metrics: they are computed anew
    assert len(table[table["metric"] == "long_answer"]) == 1
    assert "long_answer" in capsys.readouterr().out
    assert "long_answer" in (tmp_path / "runs" / "metrics.md").read_text()
    assert "more than five letters" in module.tables()


def test_a_new_model_is_one_entry(own, tiny, tmp_path, monkeypatch):
    spec = ModelSpec("my-llava", "vlm", "somebody/my-llava", architecture="llava", template="llava-1.5")
    monkeypatch.setitem(MODELS, "my-llava", spec)
    args = {**own.args, "max_new_tokens": 4}
    classify("vlm", "my-llava", tiny / "llava-1.5-7b", tmp_path / "runs", None, **args)
    table = table1(tmp_path / "runs")
    assert set(table.loc[table["tags"] == "miniature, 4 tokens", "model"]) == {"my-llava"}
    assert "my-llava" in listed(keys="models", kind="vlm")
    assert "my-llava" not in listed(keys="models", kind="vlm", paper=True)


def test_the_launchers_lists_come_from_the_registry():
    assert listed(keys="models", kind="clip", paper=True) == ["clip-vit-l-336", "eva-clip-g"]
    assert listed(keys="benchmarks", paper=True) == ["imagenet", "flowers", "cars", "caltech"]
    assert "vit-b-16" in listed(keys="models", kind="clip", benchmark="imagenet")
    assert "vit-b-16" not in listed(keys="models", kind="clip", benchmark="cars")
    assert "mini-llava" not in listed(keys="models")  # trained here: launchers have no weights for it


def test_another_seed_of_clips_closed_world_is_the_same_cell(pets, tiny, tmp_path):
    """Nothing is drawn where every class may win: Table 1 shows the run whatever the seed."""
    outputs = tmp_path / "runs"
    classify("clip", "clip-vit-l-336", tiny / "clip-vit-l-336", outputs, tmp_path, candidates="all", seed=3)
    table = table1(outputs)
    assert set(table.loc[table["value"].notna(), "setting"]) == {"closed_world"}


def test_a_configuration_says_what_tables_must_know(pets, tiny, tmp_path):
    """Tags of the weights, the split and the manifest, in run.json and in the scores, never in the model's name."""
    row = {"image": "0.png", "label": "cat", "split": "train", "note": "halves of ours"}
    (tmp_path / "pets.jsonl").write_text(json.dumps(row) + "\n")
    task = load_evaluation("pets", root=tmp_path, split="train")
    checkpoint = tiny / "llava-1.5-7b"
    config = run_config("s", "vlm", MODELS["llava-1.5-7b"], task, None, checkpoint=checkpoint, tags=["other"], layer=3)
    assert config["tags"] == ["miniature", "split train", "halves of ours", "other"]
    assert config["model"] == "llava-1.5-7b" and config["layer"] == 3 and config["classes"] == ["cat", "dog"]


def test_scores_are_read_again_until_rows_or_metrics_change(own, tiny, tmp_path, monkeypatch):
    args = {**own.args, "max_new_tokens": 4}
    classify("vlm", "llava-1.5-7b", tiny / "llava-1.5-7b", tmp_path / "runs", None, **args)
    (folder,) = (tmp_path / "runs").iterdir()
    before = score_run(folder)
    calls = []
    computed = METRICS["exact"].hits
    counting = Metric("exact", "", lambda answers: calls.append(1) or computed(answers), judges=True)
    monkeypatch.setitem(METRICS, "exact", counting)
    assert score_run(folder) == before and collect_runs([tmp_path / "runs"]).scores == before.scores and not calls
    rows = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").write_text(rows.replace('"output": "', '"output": "cat'))
    after = {score.metric: score.value for score in score_run(folder).scores}
    assert calls and after != {score.metric: score.value for score in before.scores}


def test_a_run_of_the_old_format_is_one_sentence(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": {"model": "x", "miniature": False}, "finished": "then"}))
    with pytest.raises(OldFormatError, match="old has format 1 of another version .* move the folder away"):
        read_record(folder)
    with pytest.raises(OldFormatError, match="move the folder away and run the command again"):
        open_run(folder, {"model": "x"}, ["a"])
    collected = collect_runs([tmp_path])
    assert not collected.scores and "has format 1 of another version" in collected.notes[0]
