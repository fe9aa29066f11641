"""Protects: a miniature is an ordinary checkpoint, reproducible, marked, and small."""

import json

import pytest
from conftest import run_script
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmclassifier.models import MINIATURE, MODELS
from vlmclassifier.records import UserError
from vlmclassifier.tiny import has_miniature, make_tiny

VLMS = {"llava-1.5-7b": "Llava", "llava-1.5-13b": "Llava", "blip2-2.7b": "Blip2"}


@pytest.mark.parametrize("key", VLMS)
def test_plain_from_pretrained_loads_it(key, tiny):
    model, info = AutoModelForImageTextToText.from_pretrained(tiny / key, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == f"{VLMS[key]}ForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(tiny / key)).__name__ == f"{VLMS[key]}Processor"
    assert getattr(AutoConfig.from_pretrained(tiny / key), MINIATURE)
    context = {"llava": 4096, "blip-2": 2048}[model.config.model_type]
    assert model.config.get_text_config().max_position_embeddings == context  # the true model's


def test_only_safetensors_are_written(tiny):
    for key in (key for key, spec in MODELS.items() if has_miniature(spec)):
        files = {file.suffix for file in (tiny / key).iterdir()}
        assert ".safetensors" in files and not files & {".bin", ".pt", ".py", ".pkl"}
        assert sum(file.stat().st_size for file in (tiny / key).iterdir()) < 30e6


@pytest.mark.parametrize("key", ["llava-1.5-7b", "blip2-2.7b", "clip-vit-l-336"])
def test_the_seed_decides_the_bytes(key, tiny, tmp_path):
    again, other = make_tiny(MODELS[key], tmp_path / "0"), make_tiny(MODELS[key], tmp_path / "1", seed=1)
    for file in (tiny / key).iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    weights = next(other.glob("*.safetensors"))
    assert weights.read_bytes() != (again / weights.name).read_bytes()


def test_eva_is_timms_eva(tiny):
    config = json.loads((tiny / "eva-clip-g" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"].startswith("eva") and config[MINIATURE]


def test_the_script_writes_one_and_refuses_others(tmp_path):
    run_script("scripts/make_tiny_model.py", "--model", "blip2-2.7b", "--out", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").exists()
    wrong = run_script("scripts/make_tiny_model.py", "--model", "gpt-9", "--out", tmp_path / "n", check=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a miniature"):
        make_tiny(MODELS["blip2-2.7b"], tmp_path / "mine")
    assert make_tiny(MODELS["blip2-2.7b"], tmp_path / "m") == tmp_path / "m"  # its own kind is replaced
    assert wrong.returncode == 1 and "no miniature of 'gpt-9'" in wrong.stderr
