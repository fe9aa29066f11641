"""Protects: a miniature is an ordinary checkpoint, reproducible, marked as a miniature, and small."""

import json

import pytest
from conftest import run_script
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmclassifier.models import MINIATURE, MODELS
from vlmclassifier.records import UserError
from vlmclassifier.tiny import has_miniature, make_tiny

VLMS = {"llava-1.5-7b": "Llava", "llava-1.5-13b": "Llava", "blip2-2.7b": "Blip2"}


@pytest.mark.parametrize("key", VLMS)
def test_from_pretrained_loads_a_miniature(key, tiny):
    model, info = AutoModelForImageTextToText.from_pretrained(tiny / key, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == f"{VLMS[key]}ForConditionalGeneration"
    assert type(AutoProcessor.from_pretrained(tiny / key)).__name__ == f"{VLMS[key]}Processor"
    assert getattr(AutoConfig.from_pretrained(tiny / key), MINIATURE)
    context = {"llava": 4096, "blip-2": 2048}[model.config.model_type]
    assert model.config.get_text_config().max_position_embeddings == context  # as in the released model


def test_only_safetensors_are_written(tiny):
    for key, spec in MODELS.items():
        if not has_miniature(spec):
            continue
        suffixes = {file.suffix for file in (tiny / key).iterdir()}
        assert ".safetensors" in suffixes and not suffixes & {".bin", ".pt", ".py", ".pkl"}
        assert sum(file.stat().st_size for file in (tiny / key).iterdir()) < 30e6


@pytest.mark.parametrize("key", ["llava-1.5-7b", "blip2-2.7b", "clip-vit-l-336"])
def test_the_seed_determines_the_bytes(key, tiny, tmp_path):
    same_seed, other_seed = make_tiny(MODELS[key], tmp_path / "0"), make_tiny(MODELS[key], tmp_path / "1", seed=1)
    for file in (tiny / key).iterdir():
        assert (same_seed / file.name).read_bytes() == file.read_bytes(), file.name
    weights = next(other_seed.glob("*.safetensors"))
    assert weights.read_bytes() != (same_seed / weights.name).read_bytes()


def test_the_vision_encoder_of_eva_is_timms(tiny):
    config = json.loads((tiny / "eva-clip-g" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"].startswith("eva") and config[MINIATURE]


def test_the_script_writes_miniatures_and_overwrites_nothing_else(tmp_path):
    run_script("scripts/make_tiny_model.py", "--model", "blip2-2.7b", "--out", tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").exists()
    wrong = run_script("scripts/make_tiny_model.py", "--model", "gpt-9", "--out", tmp_path / "n", check=False)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a miniature"):
        make_tiny(MODELS["blip2-2.7b"], tmp_path / "documents")
    assert make_tiny(MODELS["blip2-2.7b"], tmp_path / "m") == tmp_path / "m"  # a miniature is replaced
    assert wrong.returncode == 1 and "no miniature of 'gpt-9'" in wrong.stderr
