"""Protects: the registry's agreement with the paper, and the error messages for unusable checkpoints."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
from conftest import run_script

from vlmclassifier import load_vlm
from vlmclassifier.api.providers import PROVIDERS
from vlmclassifier.benchmarks import BENCHMARKS, find_manifest
from vlmclassifier.devices import resolve_device
from vlmclassifier.models import (
    MODELS,
    checkpoint_folder,
    find_model,
    hub_error,
    is_miniature,
    local_checkpoint,
    template_of,
)
from vlmclassifier.prompts import TEMPLATES
from vlmclassifier.records import UserError

LLAVA = MODELS["llava-1.5-7b"]


def test_the_registry_agrees_with_the_paper():
    with open("main_results/paper.csv", newline="") as stream:
        paper_names = {row["model"] for row in csv.DictReader(stream)}
    for spec in MODELS.values():
        assert spec.paper_name is None or spec.paper_name in paper_names
        assert spec.kind != "vlm" or spec.architecture
        assert spec.template is None or spec.template in TEMPLATES
        assert spec.kind != "vlm" or spec.paper_name is None or spec.template  # the paper's prompts
        assert spec.source is None or spec.source.count("/") == (0 if spec.kind == "api" else 1)
        assert (spec.kind == "api") == (spec.provider in PROVIDERS)


@pytest.mark.parametrize("key, kind", [("mini-llava", "vlm"), ("mini-clip", "clip")])
def test_a_locally_trained_model_is_not_downloaded(key, kind):
    from vlmclassifier.clip import checkpoint_path

    message = "is trained, not downloaded: run scripts/quickstart.sh or training_analysis/pretrain_mini.py"
    with pytest.raises(UserError, match=f"{key} {message}"):
        checkpoint_folder(MODELS[key]) if kind == "vlm" else checkpoint_path(MODELS[key])


def test_the_message_for_an_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'llava-1.5-7b'"):
        find_model("llava-7b", "vlm")
    with pytest.raises(UserError, match="did you mean 'clip-vit-l-336'.*open_clip NAME/TAG"):
        find_model("clip-vit-l", "clip")
    with pytest.raises(UserError, match="folder ./absent does not exist"):
        find_model("./absent", "vlm")
    with pytest.raises(UserError, match="classify_clip.py"):
        find_model("eva-clip-g", "vlm")
    assert find_model("ViT-B-32/laion2b_s34b_b79k", "clip").key == "ViT-B-32-laion2b_s34b_b79k"


def test_unusable_checkpoints_are_refused(tmp_path):
    llava, clip = MODELS["llava-1.5-7b"], MODELS["clip-vit-l-336"]

    def refuse(message, spec, path):
        with pytest.raises(UserError, match=message):
            local_checkpoint(spec, path)

    refuse("does not exist", llava, tmp_path / "absent")
    refuse("has no config.json", llava, tmp_path)
    refuse("has no open_clip_config.json", clip, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refuse("has no .*safetensors weights", llava, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuse(r"only a pickle \(pytorch_model.bin\).*convert it to safetensors", llava, tmp_path)
    refuse("is a file", llava, tmp_path / "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert local_checkpoint(llava, tmp_path) == tmp_path
    assert local_checkpoint(clip, tmp_path / "model.safetensors") == tmp_path / "model.safetensors"


def test_an_adapter_is_refused_alone_and_beside_a_model(tmp_path, tiny):
    """Beside a model it would be ignored: the base model would answer under the fine-tuned one's name."""
    alone, beside = tmp_path / "alone", shutil.copytree(tiny / "llava-1.5-7b", tmp_path / "beside")
    alone.mkdir()
    for folder in (alone, beside):
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(UserError, match=f"{folder.name} holds an adapter, which would be ignored: merge it"):
            local_checkpoint(LLAVA, folder)


def test_folders_as_trainings_leave_them(tmp_path, tiny):
    """Without a tokenizer; with the chat template in tokenizer_config.json alone; of an unknown type."""
    folder = shutil.copytree(tiny / "llava-1.5-7b", tmp_path / "a")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="has no processor that can be loaded .* copy the tokenizer"):
        load_vlm("llava-1.5-7b", folder)
    older = shutil.copytree(tiny / "qwen3-vl-8b", tmp_path / "b")
    template = (older / "chat_template.jinja").read_text()
    (older / "chat_template.jinja").unlink()
    settings = json.loads((older / "tokenizer_config.json").read_text())
    (older / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    expected = load_vlm("qwen3-vl-8b", tiny / "qwen3-vl-8b").prompt("What?")
    assert load_vlm("qwen3-vl-8b", older).prompt("What?") == expected
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava_of_tomorrow"}))
    with pytest.raises(UserError, match="does not know .* install a newer one"):
        load_vlm("llava-1.5-7b", folder)


@pytest.mark.parametrize("device", ["meta", "xpu", "mps", "tpu"])
def test_devices_that_cannot_be_used_are_refused(device):
    with pytest.raises(UserError, match=f"--device {device} is not a device"):
        resolve_device(device)
    assert resolve_device("cpu") == "cpu"


def test_weights_take_precedence_over_paths_toml(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    (tmp_path / "paths.toml").write_text('[models]\n"llava-1.5-7b" = "a"\n')
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    spec = MODELS["llava-1.5-7b"]
    assert local_checkpoint(spec) == tmp_path / "a"
    assert local_checkpoint(spec, tmp_path / "b") == tmp_path / "b"
    assert local_checkpoint(MODELS["llava-1.5-13b"]) is None


def test_a_misspelt_key_in_paths_toml_is_reported(tmp_path, monkeypatch):
    """If there is no entry for a key, a similar entry that is not a known key is probably a misspelling."""
    file = tmp_path / "paths.toml"
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(file))
    file.write_text('[models]\n"llava-1.5-7B" = "a"\n"llava-1.5-13b" = "b"\n[benchmarks]\nflower = "."\n')
    assert "has 'llava-1.5-7B' in [models]: did you mean 'llava-1.5-7b'?" in str(hub_error(LLAVA, OSError()))
    assert "did you mean" not in str(hub_error(MODELS["clip-vit-l-336"], OSError()))
    with pytest.raises(UserError, match=r"prepare_data.py flowers .*has 'flower' in .benchmarks.: did you mean 'flow"):
        find_manifest(BENCHMARKS["flowers"], tmp_path)
    with pytest.raises(UserError, match="plane_figures.jsonl.* does not exist: run scripts/quickstart.sh"):
        find_manifest(BENCHMARKS["plane_figures"], tmp_path)
    for text in ('[model]\n"llava-1.5-7b" = "a"\n', 'models = "a"\n', 'flowers = "."\n'):
        file.write_text(text)
        with pytest.raises(UserError, match="which nothing reads: entries belong in .models., .benchmarks., .trusted"):
            local_checkpoint(LLAVA)


def test_template_of_returns_the_text_of_the_template():
    assert template_of(LLAVA).startswith("USER: <image>") and template_of(MODELS["qwen3-vl-8b"]) is None
    with pytest.raises(UserError, match="has the unknown template 'foo': choose one of llava-1.5, "):
        template_of(replace(LLAVA, template="foo"))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_message_for_an_unreachable_hub_suggests_a_local_copy(tmp_path, own, offline):
    """Both in offline mode and when no server answers."""
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    flags = ["--model", "llava-1.5-13b", "--benchmark", own.manifest, "--classes", own.classes]
    done = run_script("main_results/classify_vlm.py", *flags, env=env, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("error: llava-1.5-13b could not be fetched from the hub (llava-hf/llava-1.5-13b-hf: ")
    assert "--weights" in last_line and "paths.toml" in last_line


def test_only_marked_checkpoints_are_miniatures(tmp_path, tiny):
    assert all(is_miniature(folder) for folder in tiny.iterdir())
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert not is_miniature(tmp_path)
    assert not is_miniature(tmp_path / "config.json")
    for malformed in ("{", "[]"):
        (tmp_path / "config.json").write_text(malformed)
        with pytest.raises(UserError, match="config.json is not a JSON object"):
            is_miniature(tmp_path)
