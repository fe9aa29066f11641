"""Protects: CLIP's linear head is the probe; full fine-tuning changes the visual tower alone and resumes exactly."""

import json

import pytest
import torch
from conftest import script
from safetensors.torch import load_file
from test_features import extract
from test_finetuning import classes_of_colour

from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run

__all__ = ["classes_of_colour"]  # a fixture


@pytest.fixture
def features(tiny, classes_of_colour, tmp_path):
    def make(key):
        for split in ("train", "test"):
            extract(tmp_path / f"{key}-{split}", tiny / key, key, split=split, **classes_of_colour.args)
        return {"features": tmp_path / f"{key}-train", "test_features": tmp_path / f"{key}-test"}

    return make


def test_the_linear_head_is_the_papers_probe(features, tmp_path, capsys):
    module, probe = script("training_analysis/finetune_clip.py"), script("feature_analysis/probe.py")
    folders = features("clip-vit-l-336")
    module.main(module.Args(out=tmp_path / "c", epochs=20, **folders))
    probe.main(probe.Args(folders["features"], folders["test_features"], ("image",), epochs=20, out=tmp_path / "p"))
    for end in ("", "-held_out", "-last_epoch"):
        ours, theirs = (read_run(tmp_path / f"{name}-linear{end}")[1] for name in "cp")
        assert ours == theirs and len(ours) == 4
    table = script("training_analysis/table.py")
    capsys.readouterr()
    table.main(table.Args(tmp_path / "none", tmp_path, tmp_path / "none"))
    assert "| CLIP-L (miniature, 20 epochs) | linear-held_out" in capsys.readouterr().out
    assert json.loads((tmp_path / "c-linear" / "run.json").read_text())["config"]["epochs"] == 20
    for option in ({"limit": 4}, {"split": "test"}):
        with pytest.raises(UserError, match="leave out --limit and --split"):
            module.main(module.Args(**folders, **option))
    with pytest.raises(UserError, match="p-linear.* holds another run: choose another --out"):
        module.main(module.Args(out=tmp_path / "p", epochs=20, **folders))
    with pytest.raises(UserError, match="is among the train rows and the test rows"):
        module.main(module.Args(features=folders["features"], test_features=folders["features"]))


@pytest.mark.parametrize("key", ["clip-vit-l-336", "eva-clip-g"])
def test_full_fine_tuning_resumes_exactly(key, features, tiny, classes_of_colour, tmp_path, monkeypatch):
    from vlmclassifier import load_clip

    module = script("training_analysis/finetune_clip.py")
    settings = {"model": key, "train": "full", "weights": tiny / key, "epochs": 3, "batch_size": 2, "workers": 0,
                "learning_rate": 1e-3} | features(key) | classes_of_colour.args  # fmt: skip
    module.main(module.Args(out=tmp_path / "whole", **settings))
    record = json.loads((tmp_path / "whole-full" / "training.json").read_text())
    assert [row["epoch"] for row in record["epochs"]] == [1, 2, 3]
    assert record["epochs"][-1]["loss"] < record["epochs"][0]["loss"]
    assert {file.name for file in tmp_path.glob("whole-*")} == {
        "whole-full", "whole-full-held_out", "whole-full-last_epoch", "whole-full-papers_rule"
    }  # fmt: skip
    weights = load_file(tmp_path / "whole-full" / "last-3" / "visual.safetensors")
    before = load_clip(key, tiny / key).model.state_dict()
    changed = {name for name, value in weights.items() if name.startswith("clip.")
               and not torch.equal(value, before[name.removeprefix("clip.")])}  # fmt: skip
    assert changed and all("text" not in name for name in weights) and "head.weight" in weights
    from vlmclassifier.runs import record as records

    original, counted = records.replace_file, []

    def stop(when):
        def replace(file, text):
            counted.append(file)
            if when == "before":  # the weights of the second epoch are there, but it is not counted
                raise KeyboardInterrupt
            original(file, text)
            raise KeyboardInterrupt

        return lambda file, text: replace(file, text) if '"epoch": 2' in text else original(file, text)

    for when in ("before", "after"):
        with monkeypatch.context() as patch:
            patch.setattr(records, "replace_file", stop(when))
            with pytest.raises(KeyboardInterrupt):
                module.main(module.Args(out=tmp_path / "resumed", **settings))
    assert [file.name for file in counted] == ["training.json"] * 2
    module.main(module.Args(out=tmp_path / "resumed", **settings))
    again = load_file(tmp_path / "resumed-full" / "last-3" / "visual.safetensors")
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    with pytest.raises(UserError, match="holds a training of another configuration"):
        module.main(module.Args(out=tmp_path / "whole", **settings | {"learning_rate": 1e-4}))
