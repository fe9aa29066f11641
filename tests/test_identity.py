"""Protects: what a run is: its rows, not the bytes of the manifest; its weights, not the name of their folder."""

import json
import shutil

import pytest
from conftest import ROOT, noise, script

from vlmclassifier.benchmarks import load_evaluation
from vlmclassifier.identity import checkpoint_tags, model_sizes
from vlmclassifier.models import MODELS
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run
from vlmclassifier.scoring.runs import _unverified, collect_runs, score_run

CLIP = "clip-vit-l-336"


@pytest.fixture
def classify(own, tiny):
    """Run classify_clip.py on the benchmark of three images; returns the run's record and evaluated rows."""
    module = script("main_results/classify_clip.py")

    def run(out, **options):
        weights = options.pop("weights", tiny / CLIP)
        module.main(module.Args(weights=weights, out=out, **{**own.args, **options}))
        return read_run(out) if out else None

    return run


def test_a_removed_row_finishes_the_run_and_its_answers_stay(own, classify, tmp_path, capsys):
    """The advice of the message: remove the row of a truncated image and go on."""
    image = own.folder / "1.png"
    image.write_bytes(image.read_bytes()[:-30])
    with pytest.raises(UserError, match="remove its row, or add --skip-broken-images"):
        classify(tmp_path / "run", batch_size=1)
    kept = (tmp_path / "run" / "part-0.jsonl").read_text()
    own.rows = [row for row in own.rows if row["image"] != "1.png"]
    own.write()
    record, rows = classify(tmp_path / "run")
    assert [row.example_id for row in rows] != [] and record["rows"] == record["target"] == len(rows) == 2
    assert set(kept.splitlines()) <= set((tmp_path / "run" / "predictions.jsonl").read_text().splitlines())


def test_rows_that_are_removed_later_are_kept_and_not_scored(own, classify, tmp_path):
    runs = tmp_path / "runs"
    classify(runs / "run")
    removed = own.rows.pop(0)["image"]
    own.write()
    record, rows = classify(runs / "run")
    assert record["finished"] and record["rows"] == 3 and len(rows) == 2
    assert removed not in {row.example_id for row in rows}
    assert removed in (runs / "run" / "predictions.jsonl").read_text()
    collected = collect_runs([runs])
    assert {score.n for score in collected.scores if score.metric == "accuracy"} == {2}
    assert any("1 recorded answers are kept and not scored" in note for note in collected.notes)


def test_rows_of_another_split_or_more_rows_continue_the_run(own, classify, tmp_path):
    classify(tmp_path / "run")
    before = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    noise((20, 20)).save(own.folder / "new.png")
    own.rows.append({"image": "new.png", "label": "cat", "split": "train"})
    own.write()
    assert len(classify(tmp_path / "run")[1]) == 3  # a row of the train split is no part of this run
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == before
    own.rows[-1]["split"] = "test"
    own.write()
    assert len(classify(tmp_path / "run")[1]) == 4
    record, rows = classify(tmp_path / "run", limit=2)
    assert len(rows) == record["target"] == 4  # a smaller limit shrinks nothing
    own.rows.pop(1)
    own.write()
    record, rows = classify(tmp_path / "run", limit=2)  # with another manifest the head is drawn anew
    assert len(rows) == record["target"] == 2 and record["rows"] == 4


def test_another_label_of_a_recorded_image_is_refused(own, classify, tmp_path):
    classify(tmp_path / "run")
    own.rows[0]["label"] = "dog"
    own.write()
    with pytest.raises(UserError, match="about 0.png with the label 'cat', which is 'dog' in the manifest now"):
        classify(tmp_path / "run")


def test_broken_images_are_skipped_on_request_and_the_table_says_how_many(own, classify, tmp_path, capsys):
    image = own.folder / "1.png"
    image.write_bytes(image.read_bytes()[:-30])
    record, rows = classify(tmp_path / "run", skip_broken_images=True)
    assert {row.example_id for row in rows} == {"0.png", "2.png"} and record["config"]["skipped_images"] == ["1.png"]
    printed = capsys.readouterr()
    assert "skipped: " in printed.err and "1.png" in printed.err
    assert "CLIP-L (miniature, 1 broken images skipped), closed_world, mine: accuracy" in printed.out
    assert "n=2" in printed.out


def test_a_run_that_has_rows_goes_on_without_its_broken_images(own, classify, tmp_path, capsys):
    image = own.folder / "1.png"
    image.write_bytes(image.read_bytes()[:-30])
    with pytest.raises(UserError, match="add --skip-broken-images"):
        classify(tmp_path / "run", batch_size=1)
    record, rows = classify(tmp_path / "run", skip_broken_images=True)
    assert record["finished"] and len(rows) == record["target"] == 2
    assert "1 broken images skipped" in capsys.readouterr().out


def test_tags_are_those_of_the_latest_command(own, classify, tmp_path, monkeypatch):
    """So a fingerprint that is listed later takes the note away, by the command that is advised."""
    fingerprint = classify(tmp_path / "run")[0]["config"]["checkpoint"]
    (tmp_path / "paths.toml").write_text(f'[fingerprints]\n{CLIP} = "{fingerprint}"\n')
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    assert classify(tmp_path / "run")[0]["config"]["verified"]


def test_manifests_of_one_name_in_two_folders_are_two_benchmarks(own, classify, tmp_path):
    classify(tmp_path / "run")
    other = shutil.copytree(own.folder, tmp_path.parent / f"{tmp_path.name}-other", ignore=lambda *_: ["run"])
    with pytest.raises(UserError, match="holds a run of another configuration .data_root"):
        classify(tmp_path / "run", benchmark=str(other / "mine.jsonl"))


def test_absolute_paths_below_a_relative_data_root_are_read(own, monkeypatch):
    own.rows = [row | {"image": str(own.folder / row["image"])} for row in own.rows]
    own.write()
    monkeypatch.chdir(own.folder)
    relative = own.folder.parent / own.folder.name / ".." / own.folder.name
    assert len(load_evaluation(str(own.manifest), own.classes, relative).examples) == 3


def released(folder, **config):
    """A folder of LLaVA's architecture that is not marked as a miniature."""
    folder.mkdir()
    text = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32} | config
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    return folder


def test_a_folder_is_the_registered_model_only_with_its_sizes_and_without_a_training(tmp_path):
    spec = MODELS["llava-1.5-7b"]
    folder = released(tmp_path / "a")
    assert checkpoint_tags(spec, folder) == [] and model_sizes(spec, folder) == (4096, 32)
    assert checkpoint_tags(MODELS["llava-1.5-13b"], folder) == ["4096 wide, 32 layers"]
    for name in ("trainer_state.json", "adapter_config.json", "training.json", "optimizer.pt"):
        (folder / name).write_text("{}")
        assert checkpoint_tags(spec, folder) == ["trained further"]
        (folder / name).unlink()
    (folder / "config.json").write_text('{"model_type": "of_tomorrow"}')
    assert checkpoint_tags(spec, folder) == []  # loading it says what is wrong
    assert all(MODELS[key].sizes for key in MODELS if MODELS[key].kind == "vlm" and MODELS[key].source)


def test_two_checkpoints_of_one_model_have_two_rows(own, classify, tiny, tmp_path, monkeypatch):
    """Also of the same folder name: neither replaces the other, and only a verified one is compared with the paper."""
    other = shutil.copytree(tiny / CLIP, tmp_path / "other" / CLIP)
    (other / "note.txt").write_text("other weights")
    classify(tmp_path / "runs" / "a")
    classify(tmp_path / "runs" / "b", weights=other)
    first, second = (read_run(tmp_path / "runs" / name)[0]["config"]["checkpoint"][:8] for name in "ab")
    tags = {score.tags for score in collect_runs([tmp_path / "runs"]).scores}
    assert tags == {("miniature", f"weights {first}"), ("miniature", f"weights {second}")}
    paths = tmp_path / "paths.toml"
    fingerprint = read_run(tmp_path / "runs" / "a")[0]["config"]["checkpoint"]
    paths.write_text(f'[fingerprints]\n{CLIP} = "{fingerprint}"\n')
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(paths))
    classify(tmp_path / "runs" / "c", limit=2)
    assert read_run(tmp_path / "runs" / "c")[0]["config"]["verified"]
    tags = {score.tags for score in collect_runs([tmp_path / "runs"]).scores}
    assert tags == {("miniature",), ("miniature", f"weights {second}")}


def test_a_checkpoint_that_is_listed_nowhere_is_noted(tmp_path):
    config = {
        "kind": "clip",
        "model": CLIP,
        "checkpoint": "a" * 64,
        "verified": False,
        "tags": [],
        "benchmark": "flowers",
    }
    (note,) = _unverified([config, config])
    assert note.startswith("CLIP-L is unverified") and "[fingerprints]" in note
    assert not _unverified([config | {"verified": True}]) and not _unverified([config | {"tags": ["miniature"]}])


def test_other_token_limits_and_dtypes_are_tags(own, tiny, tmp_path):
    module = script("main_results/classify_vlm.py")
    module.main(module.Args(weights=tiny / "llava-1.5-7b", max_new_tokens=4, dtype="bfloat16", batch_size=2,
                            out=tmp_path / "run", **own.args))  # fmt: skip
    run = score_run(tmp_path / "run")
    assert run.scores[0].tags == ("miniature", "4 tokens", "bfloat16")
    assert read_run(tmp_path / "run")[0]["sessions"][0]["batch_size"] == 2


def test_some_rows_of_a_papers_split_are_a_tag(own, tmp_path):
    noise((20, 20)).save(tmp_path / "0.png")
    row = {"image": "0.png", "label": "rose", "split": "test"}
    (tmp_path / "flowers.jsonl").write_text(json.dumps(row) + "\n")
    assert load_evaluation("flowers", root=tmp_path).tags == ("1 of 6,149 images",)


def test_default_folders_tell_split_seed_and_weights_apart(own, classify, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmclassifier.paths.OUTPUTS", tmp_path / "outputs")
    own.rows[0]["split"] = "train"
    own.write()
    classify(None)
    classify(None, split="train")
    classify(None, candidates="2", seed=1)
    classify(None, name="mine-again")
    module = script("main_results/classify_vlm.py")
    folders = [shutil.copytree(tiny / "llava-1.5-7b", tmp_path / name / "tuned") for name in "ab"]
    (folders[1] / "note.txt").write_text("other weights")
    for folder in folders:
        with pytest.raises(UserError, match="chat template"):  # the miniature has the template of the registry only
            module.main(module.Args(str(folder), **own.args))
    found = sorted(file.parent.name for file in tmp_path.glob("outputs/main_results/*/run.json"))
    assert found[:4] == [f"{CLIP}-mine-2_classes-seed_1", f"{CLIP}-mine-closed_world",
                         f"{CLIP}-mine-split_train-closed_world", "mine-again-closed_world"]  # fmt: skip
    assert len(found) == 6 and all(name.startswith("tuned-") for name in found[4:])


def test_every_finished_run_is_in_the_table_that_the_script_names(own, classify, tmp_path, capsys):
    for options in ({"candidates": "2"}, {"candidates": "2", "seed": 1}):
        classify(tmp_path / "runs" / f"run-{len(options)}", **options)
    assert f"Next: python main_results/table.py --outputs {tmp_path / 'runs'}" in capsys.readouterr().out
    table = script("main_results/table.py")
    table.main(table.Args(outputs=tmp_path / "runs"))
    printed = capsys.readouterr().out
    assert "| 2_classes " in printed and "| 2_classes-seed_1 " in printed
    assert "2_classes-seed_1" in (tmp_path / "runs" / "other_settings.md").read_text()


def test_the_launchers_skip_no_closed_world():
    for file in ROOT.glob("*/*.sh"):
        assert "= imagenet" not in file.read_text(), file
