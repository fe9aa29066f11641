"""Protects: several ways of asking in one run give the rows of a run each, and encode each picture once."""

import json

import pytest
import torch
from conftest import noise, run_script, script

from vlmclassifier import load_vlm
from vlmclassifier.clip import CLIP
from vlmclassifier.records import ContextError
from vlmclassifier.runs import open_run, pending_together, read_run
from vlmclassifier.tables import run_folder
from vlmclassifier.vlm import VLM
from vlmclassifier.vlm.model import joined, split


def classify(kind, weights, out, **more):
    module = script(f"main_results/classify_{kind}.py")
    module.main(module.Args(weights=weights, out=out, **more))


@pytest.mark.parametrize("key", ["llava-1.5-7b", "blip2-2.7b", "qwen3-vl-8b", "instructblip-7b"])
def test_ways_of_asking_share_the_pictures(key, tiny, own, tmp_path, monkeypatch):
    """Candidates x wordings at once and one by one: the same bytes. InstructBLIP's pictures depend on the question."""
    seen, encode = [], VLM.encode

    def counted(vlm, images, prompt):
        seen.extend(images)
        return encode(vlm, images, prompt)

    monkeypatch.setattr(VLM, "encode", counted)
    common = {"model": key, "max_new_tokens": 12, "batch_size": 2, **own.args}
    classify("vlm", tiny / key, tmp_path / "all", candidates=("none", "2"), wording=("base", "alternative_1"), **common)
    assert len(seen) == 3  # three pictures, four questions about each
    for setting, way in {
        "open_world": {}, "2_classes": {"candidates": "2"},
        "open_world-prompt_alternative_1": {"wording": "alternative_1"},
        "2_classes-prompt_alternative_1": {"candidates": "2", "wording": "alternative_1"},
    }.items():  # fmt: skip
        classify("vlm", tiny / key, tmp_path / setting, **way, **common)
        for name in ("predictions.jsonl", "scores.csv"):
            assert (tmp_path / f"all-{setting}" / name).read_bytes() == (tmp_path / setting / name).read_bytes()
    assert len(seen) == 3


def test_clip_encodes_a_picture_once_for_all_lists(tiny, own, tmp_path, monkeypatch):
    own.classes.write_text(json.dumps(["cat", "dog", "horse", "owl"]))
    seen, encode = [], CLIP.encode_images

    def counted(clip, images):
        seen.extend(images)
        return encode(clip, images)

    monkeypatch.setattr(CLIP, "encode_images", counted)
    weights = tiny / "clip-vit-l-336"
    classify("clip", weights, tmp_path / "all", candidates=("2", "3", "all"), **own.args)
    assert len(seen) == 3
    for setting, candidates in (("2_classes", "2"), ("3_classes", "3"), ("closed_world", "all")):
        classify("clip", weights, tmp_path / setting, candidates=candidates, **own.args)
        rows = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in (f"all-{setting}", setting)]
        assert rows[0] == rows[1]


def test_a_way_that_does_not_fit_leaves_the_others(tiny, own, tmp_path):
    own.classes.write_text(json.dumps(["cat", "dog", *(f"zygomorphic {number}" for number in range(900))]))
    with pytest.raises(ContextError, match="closed_world: The longest prompt"):
        classify("vlm", tiny / "llava-1.5-7b", tmp_path / "run", candidates=("all", "none"), **own.args)
    assert len(read_run(tmp_path / "run-open_world")[1]) == 3
    record, rows = read_run(tmp_path / "run-closed_world")
    assert "not_applicable" in record and not rows


def test_a_question_that_turns_out_too_long_is_noted_and_the_others_go_on(tiny, own, tmp_path, monkeypatch):
    """Should the check before the first picture have missed it: the table must say N/A, not "repeat the command"."""
    generate = VLM.generate

    def limited(vlm, inputs, *args):
        if inputs["input_ids"].shape[1] > 75:
            raise ContextError("The longest prompt has too many tokens.")
        return generate(vlm, inputs, *args)

    monkeypatch.setattr(VLM, "generate", limited)
    with pytest.raises(ContextError, match="2_classes: The longest prompt"):
        classify("vlm", tiny / "llava-1.5-7b", tmp_path / "run", candidates=("2", "none"), max_new_tokens=4, **own.args)
    assert len(read_run(tmp_path / "run-open_world")[1]) == 3
    assert "too many tokens" in read_run(tmp_path / "run-2_classes")[0]["not_applicable"]


def test_the_folder_of_several_runs():
    from pathlib import Path

    assert run_folder(Path("a/b"), "s", "n", "closed_world", True) == Path("a/b-closed_world")
    assert run_folder(Path("a/b"), "s", "n", "closed_world", False) == Path("a/b")
    assert run_folder(Path("."), "s", "n", "x", True).name == f"{Path.cwd().name}-x"


def test_a_lease_is_of_all_runs_or_of_none(tmp_path):
    """What one run has answered already is not asked again; another process's lease is waited for in every run."""
    order = [f"{number}.jpg" for number in range(4)]
    from stub_run import answer

    first, second = (open_run(tmp_path / name, {"limit": None}, order) for name in ("a", "b"))
    first.append([answer("1.jpg")])
    got = []
    for lists in pending_together([first, second], 2):
        got.append(lists)
        for run, ids in zip((first, second), lists, strict=True):
            if ids:
                run.append([answer(i) for i in ids])
    assert got == [[["0.jpg"], ["0.jpg", "1.jpg"]], [["2.jpg", "3.jpg"], ["2.jpg", "3.jpg"]]]
    assert len(first.finish()) == len(second.finish()) == 4


@pytest.mark.parametrize("key", ["llava-1.5-7b", "qwen3-vl-8b", "llava-next-vicuna-7b"])
def test_features_of_a_batch_are_split_by_picture_or_not_at_all(key, tiny):
    """Tiles of several pictures in one tensor cannot be told apart: LLaVA-NeXT's are encoded one by one."""

    vlm = load_vlm(key, tiny / key)
    images = [noise(size) for size in ((90, 60), (60, 60), (50, 150))]
    prompt = vlm.prompt("What?")
    whole = vlm.image_features(vlm.prepare(images, [prompt] * 3))
    if whole is None:
        assert vlm.encode(images, prompt) is None  # an older transformers cannot take them
        return
    assert (split(whole, 3) is None) == (len(whole.pooler_output) != 3)
    apart, alone = vlm.encode(images, prompt), [vlm.image_features(vlm.prepare([i], [prompt])) for i in images]
    for one, other in zip(apart, alone, strict=True):
        assert torch.allclose(joined([one]).pooler_output[0], joined([other]).pooler_output[0], atol=1e-5)


def test_the_command_line_takes_several_values(own, tiny, tmp_path):
    flags = [word for key, value in own.args.items() for word in (f"--{key}", value)]
    words = ["--wording", "base", "alternative_2", "--max-new-tokens", "4", "--out", tmp_path / "r", *flags]
    done = run_script("main_results/classify_vlm.py", "--weights", tiny / "llava-1.5-7b", *words)
    assert "open_world-prompt_alternative_2, mine: accuracy" in done.stdout
    assert {f.name for f in tmp_path.glob("r-*")} == {"r-open_world", "r-open_world-prompt_alternative_2"}
