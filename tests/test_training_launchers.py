"""Protects: the launchers of training fill the tables, and forgetting is measured, on real photographs."""

import csv
import json
import re

import pytest
from conftest import run_script, script
from test_finetuning import classes_of_colour, finetune

from vlmclassifier.records import UserError

__all__ = ["classes_of_colour"]  # a fixture
MODELS = ("llava-1.5-7b", "blip2-2.7b", "clip-vit-l-336")


@pytest.mark.slow
def test_the_launchers_fill_the_tables(realdata, tiny, tmp_path):
    lines = ["[models]", *(f"'{key}' = '{tiny / key}'" for key in MODELS), "[benchmarks]", f"caltech = '{realdata}'"]
    (tmp_path / "paths.toml").write_text("\n".join(lines))
    image = json.loads((realdata / "caltech.jsonl").read_text().splitlines()[0])["image"]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A face"}]
    talks = [{"id": number, "image": image, "conversations": turns} for number in range(6)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    out = tmp_path / "out"
    env = {"VLMCLASSIFIER_PATHS": str(tmp_path / "paths.toml"), "OUTPUTS": str(out), "BENCHMARKS": "caltech",
           "EPOCHS": "1", "LIMIT": "8", "ROWS": "16", "BATCH_SIZE": "8",
           "MORE": "--effective-batch 8 --lora-rank 4 --evaluate-test --evaluated 6"}  # fmt: skip
    printed = run_script("bash", "training_analysis/finetune_llava.sh", env=env).stdout
    assert re.search(r"LLaVA1.5-7B \(miniature, .*LoRA rank 4, 120 of .* \| projector_and_lm_lora-held_out", printed)
    assert re.search(r"\(miniature, .* 6 of 4,331 images, 10% of the train rows held out\) +\| projector ", printed)
    printed = run_script("bash", "training_analysis/finetune_blip.sh", env=env).stdout
    assert re.search(r"BLIP2-2.7B \(miniature, .*16 of 4,.* train images, .*\) +\| projector-held_out", printed)
    clip = env | {"MODELS": "clip-vit-l-336", "FULL": "1", "EPOCHS": "1"}
    printed = run_script("bash", "training_analysis/finetune_clip.sh", env=clip).stdout
    assert re.search(r"CLIP-L \(miniature, 120 of 4,331 images.* of .* train images, .*\) +\| full-held_out", printed)
    mixed = env | {"TEXTS": str(tmp_path / "talks.json"), "IMAGE_ROOT": str(realdata)}
    printed = run_script("bash", "training_analysis/mixture.sh", env=mixed).stdout
    assert re.search(r"Finetuned on ImageNet\+LLaVA \(miniature, .* 120 of .* \| open_world-held_out", printed)
    done = run_script("bash", "training_analysis/mixture.sh", env=env, check=False)
    assert done.returncode == 1 and "TEXTS (a LLaVA file" in done.stderr
    captions = env | {"CAPTIONER": "llava-1.5-7b", "CAPTION_ARGS": "--local"}
    done = run_script("bash", "training_analysis/captions.sh", env=captions, check=False)
    assert "has no caption of an image of this split" in done.stderr  # a miniature names nothing
    assert (out / "training_analysis" / "caltech-captions.jsonl").read_text().count('"caption": null') == 16
    grid = mixed | {"RATES": "1", "SHARES": "0 1", "STEPS": "1", "IMAGES": "4", "TRAIN": "projector",
                    "MORE": "--effective-batch 8 --limit 16 --evaluated 2"}  # fmt: skip
    run_script("bash", "training_analysis/forgetting.sh", env=grid)
    with open(out / "training_analysis" / "forgetting-llava-1.5-7b-caltech" / "forgetting.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["model"] for row in rows}) == 3 and len(rows) == 3 * 6 and {row["n"] for row in rows} == {"4"}


def test_forgetting_counts_names_and_facts(tiny, classes_of_colour, figures_root, tmp_path, monkeypatch, capsys):
    """Answers that are a class name alone, and facts that are right; finished answers are not asked for again."""
    from vlmclassifier.vlm import VLM

    module, asked = script("training_analysis/forgetting.py"), []

    def generate(self, batch, new_tokens, features=None):
        asked.extend(batch.prompts)
        return [" Cardioid. " if "photo" in prompt else "a rose of curves" for prompt in batch.prompts]

    monkeypatch.setattr(VLM, "generate", generate)
    args = module.Args("llava-1.5-7b", tiny / "llava-1.5-7b", benchmark="plane_figures", data_root=figures_root)
    args.images, args.out = 8, tmp_path / "out"
    module.main(args)
    with open(tmp_path / "out" / "forgetting.csv", newline="") as stream:
        rows = {(row["images"], row["questions"]): row for row in csv.DictReader(stream)}
    assert set(rows) == {
        (images, kind) for images in ("trained", "new") for kind in ("trained", "another wording", "new")
    }
    assert float(rows["new", "trained"]["class_names"]) == 100 and float(rows["new", "new"]["class_names"]) == 0
    count = len(asked)
    module.main(args)
    assert len(asked) == count == 48 and "as it is" in capsys.readouterr().out
    weights = finetune(tiny, classes_of_colour, tmp_path / "run", steps=1, epochs=None) / "last"
    own = module.Args("llava-1.5-7b", tiny / "llava-1.5-7b", **classes_of_colour.args, adapters=(weights,))
    own.out = tmp_path / "own"
    module.main(own)
    with open(own.out / "forgetting.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["images"] == "trained"]
    assert {row["n"] for row in rows} == {"8"}  # of twelve train images a quarter of each class was held out
    assert {row["model"] for row in rows} == {"as it is", "run/last"}
    assert "steps 1, learning_rate 0.01" in rows[-1]["training"]
    other = finetune(tiny, classes_of_colour, tmp_path / "other", steps=1, epochs=None, held_out=0.0) / "last"
    own.adapters = (weights, other)
    with pytest.raises(UserError, match="--adapters were trained on different images"):
        module.main(own)
    args.dtype = "bfloat16"
    with pytest.raises(UserError, match="or of another --dtype"):
        module.main(args)
    args.dtype, args.images = "float32", 4
    with pytest.raises(UserError, match="has answers to other images or questions"):
        module.main(args)
