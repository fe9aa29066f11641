"""Protects: several settings in one command give the same rows as one command each, and encode each image once."""

import json

import pytest
import torch
from conftest import noise, run_script, script

from vlmclassifier import load_vlm
from vlmclassifier.clip import CLIP
from vlmclassifier.paths import run_folder
from vlmclassifier.records import ContextError
from vlmclassifier.runs import open_run, pending_together, read_run
from vlmclassifier.vlm import VLM
from vlmclassifier.vlm.model import join_features, split_features


def classify(kind, weights, out, **options):
    module = script(f"main_results/classify_{kind}.py")
    module.main(module.Args(weights=weights, out=out, **options))


@pytest.mark.parametrize("key", ["llava-1.5-7b", "blip2-2.7b", "qwen3-vl-8b", "instructblip-7b"])
def test_settings_share_the_images(key, tiny, own, tmp_path, monkeypatch):
    """Candidates x wordings in one command and one by one: the same bytes, also for InstructBLIP.

    Its image features depend on the question, so they cannot be shared.
    """
    encoded_images, encode_images = [], VLM.encode_images

    def count_images(vlm, images, prompt):
        encoded_images.extend(images)
        return encode_images(vlm, images, prompt)

    monkeypatch.setattr(VLM, "encode_images", count_images)
    common = {"model": key, "max_new_tokens": 12, "batch_size": 2, **own.args}
    classify("vlm", tiny / key, tmp_path / "all", candidates=("none", "2"), wording=("base", "alternative_1"), **common)
    assert len(encoded_images) == 3  # three images, four questions about each
    for setting, options in {
        "open_world": {}, "2_classes": {"candidates": "2"},
        "open_world-prompt_alternative_1": {"wording": "alternative_1"},
        "2_classes-prompt_alternative_1": {"candidates": "2", "wording": "alternative_1"},
    }.items():  # fmt: skip
        classify("vlm", tiny / key, tmp_path / setting, **options, **common)
        for name in ("predictions.jsonl", "scores.csv"):
            assert (tmp_path / f"all-{setting}" / name).read_bytes() == (tmp_path / setting / name).read_bytes()
    assert len(encoded_images) == 3


def test_clip_encodes_an_image_once_for_all_candidate_lists(tiny, own, tmp_path, monkeypatch):
    own.classes.write_text(json.dumps(["cat", "dog", "horse", "owl"]))
    encoded_images, encode_images = [], CLIP.encode_images

    def count_images(clip, images):
        encoded_images.extend(images)
        return encode_images(clip, images)

    monkeypatch.setattr(CLIP, "encode_images", count_images)
    weights = tiny / "clip-vit-l-336"
    classify("clip", weights, tmp_path / "all", candidates=("2", "3", "all"), **own.args)
    assert len(encoded_images) == 3
    for setting, candidates in (("2_classes", "2"), ("3_classes", "3"), ("closed_world", "all")):
        classify("clip", weights, tmp_path / setting, candidates=candidates, **own.args)
        rows = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in (f"all-{setting}", setting)]
        assert rows[0] == rows[1]


def test_settings_that_fit_are_run_if_another_does_not(tiny, own, tmp_path):
    own.classes.write_text(json.dumps(["cat", "dog", *(f"zygomorphic {number}" for number in range(900))]))
    with pytest.raises(ContextError, match="closed_world: The longest prompt"):
        classify("vlm", tiny / "llava-1.5-7b", tmp_path / "run", candidates=("all", "none"), **own.args)
    assert len(read_run(tmp_path / "run-open_world")[1]) == 3
    record, rows = read_run(tmp_path / "run-closed_world")
    assert "not_applicable" in record and not rows


def test_a_prompt_that_exceeds_the_context_only_at_the_end_is_recorded(tiny, own, tmp_path, monkeypatch):
    """If the check before the first image misses it, the cell is still N/A, and the other settings are run."""
    generate = VLM.generate

    def limited(vlm, batch, *args):
        if batch.inputs["input_ids"].shape[1] > 75:
            raise ContextError("The longest prompt has too many tokens.")
        return generate(vlm, batch, *args)

    monkeypatch.setattr(VLM, "generate", limited)
    with pytest.raises(ContextError, match="2_classes: The longest prompt"):
        classify("vlm", tiny / "llava-1.5-7b", tmp_path / "run", candidates=("2", "none"), max_new_tokens=4, **own.args)
    assert len(read_run(tmp_path / "run-open_world")[1]) == 3
    assert "too many tokens" in read_run(tmp_path / "run-2_classes")[0]["not_applicable"]


def test_run_folders_of_several_settings():
    from pathlib import Path

    assert run_folder(Path("a/b"), "s", "n", "closed_world", True) == Path("a/b-closed_world")
    assert run_folder(Path("a/b"), "s", "n", "closed_world", False) == Path("a/b")
    assert run_folder(Path("."), "s", "n", "x", True).name == f"{Path.cwd().name}-x"


def test_a_lease_covers_all_runs(tmp_path):
    """Each lease lists the pending ids of every run; rows that one run has already are not in its list."""
    order = [f"{number}.jpg" for number in range(4)]
    from stub_run import answer

    runs = [open_run(tmp_path / name, {"limit": None}, order) for name in ("a", "b")]
    runs[0].append([answer("1.jpg")])
    leases = []
    for lease in pending_together(runs, 2):
        leases.append(lease)
        for run, ids in zip(runs, lease, strict=True):
            if ids:
                run.append([answer(example_id) for example_id in ids])
    assert leases == [[["0.jpg"], ["0.jpg", "1.jpg"]], [["2.jpg", "3.jpg"], ["2.jpg", "3.jpg"]]]
    assert len(runs[0].finish()) == len(runs[1].finish()) == 4


@pytest.mark.parametrize("key", ["llava-1.5-7b", "qwen3-vl-8b", "llava-next-vicuna-7b"])
def test_features_of_a_batch_are_split_by_image_or_encoded_one_by_one(key, tiny):
    """LLaVA-NeXT returns one tensor with the tiles of all images, which cannot be split."""
    vlm = load_vlm(key, tiny / key)
    images = [noise(size) for size in ((90, 60), (60, 60), (50, 150))]
    prompt = vlm.prompt("What?")
    batch_features = vlm.image_features(vlm.process(images, [prompt] * 3))
    if batch_features is None:  # older versions of transformers do not accept precomputed features
        assert vlm.encode_images(images, prompt) is None
        return
    assert (split_features(batch_features, 3) is None) == (len(batch_features.pooler_output) != 3)
    features = vlm.encode_images(images, prompt)
    expected = [vlm.image_features(vlm.process([image], [prompt])) for image in images]
    for row, expected_row in zip(features, expected, strict=True):
        output, expected_output = join_features([row]).pooler_output[0], join_features([expected_row]).pooler_output[0]
        assert torch.allclose(output, expected_output, atol=1e-5)


def test_the_command_line_accepts_several_values(own, tiny, tmp_path):
    flags = ["--wording", "base", "alternative_2", "--max-new-tokens", "4", "--out", tmp_path / "r"]
    for key, value in own.args.items():
        flags += [f"--{key}", value]
    done = run_script("main_results/classify_vlm.py", "--weights", tiny / "llava-1.5-7b", *flags)
    assert "open_world-prompt_alternative_2, mine: accuracy" in done.stdout
    folders = {folder.name for folder in tmp_path.glob("r-*")}
    assert folders == {"r-open_world", "r-open_world-prompt_alternative_2"}
