"""Protects: one image is classified by one command, with probabilities that are those of the ranking."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, run_script

from vlmclassifier import load_vlm
from vlmclassifier.__main__ import Args, main
from vlmclassifier.plane_figures import FIGURES
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.ranking import Ranker
from vlmclassifier.records import UserError


@pytest.mark.parametrize("key", ["llava-1.5-7b", "qwen3-vl-8b"])
def test_probabilities_are_the_softmax_of_the_ranking(key, tiny, tmp_path, capsys):
    noise((64, 48)).save(tmp_path / "a.png")
    names = ("cat", "a long name of things", "cat food", "dog")
    main(Args(key, tiny / key, image=tmp_path / "a.png", names=(*names, "cat"), as_json=True))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["probabilities"]) == set(names) and sum(found["probabilities"].values()) == pytest.approx(1)
    vlm = load_vlm(key, tiny / key)
    ranker = Ranker(vlm, list(names), WORDINGS["base"])
    scores = np.exp(ranker.log_probs([noise((64, 48))])[0].astype(float))
    for name, score in zip(names, scores / scores.sum(), strict=True):
        assert found["probabilities"][name] == pytest.approx(score, rel=1e-4)
    assert found["answer"] == vlm.ask(noise((64, 48)), WORDINGS["base"])


def test_the_command_prints_the_likeliest_names(trained, figures_root, tmp_path):
    image = next(figures_root.glob("test/*/astroid.png"))
    done = run_script("-m", "vlmclassifier", image, "--benchmark", "plane_figures", "--model", "mini-llava",
                      "--weights", trained / "vlm", "--top", 3)  # fmt: skip
    lines = done.stdout.strip().splitlines()[-4:]
    assert [line.split("  ")[0].strip() in FIGURES for line in lines[:3]] == [True] * 3
    assert all("%" in line for line in lines[:3]) and lines[3].startswith("Free answer: ")


def test_mistakes_are_one_sentence(tiny, tmp_path):
    noise((30, 20)).save(tmp_path / "a.png")
    (tmp_path / "none.png").write_bytes(b"x")
    common = {"weights": tiny / "llava-1.5-7b", "image": tmp_path / "a.png"}
    for options, message in (
        ({}, "Give either --names A B C or --benchmark NAME"),
        ({"names": ("a", "b"), "benchmark": "flowers"}, "Give either --names"),
        ({"names": ("a", "a")}, "One name alone always has probability 1"),
        ({"names": ("a", "b"), "image": tmp_path / "b.png"}, "b.png does not exist"),
        ({"names": ("a", "b"), "image": tmp_path}, "is a folder: give the path of a file"),
        ({"names": ("a", "b"), "image": tmp_path / "none.png"}, "none.png .*: give another image"),
        ({"names": ("a", "b"), "image": Path()}, "No image is given: put it before --names"),
        ({"names": ("a", " a ", "")}, "One name alone"),
        ({"names": ("a", "b"), "top": 0}, "--top 0"),
    ):
        with pytest.raises(UserError, match=message):
            main(Args(**common | options))


@pytest.mark.parametrize("key", ["llava-1.5-7b", "qwen3-vl-8b"])
def test_names_of_one_token_have_the_probabilities_of_transformers_decision_pipeline(key, tiny):
    """That pipeline reads the next-token logits of labels; a name of one token is ranked by the same logit."""
    from transformers import pipeline
    from transformers.decision import DecisionConfig

    names, image, vlm = list("bcdfgh"), noise((64, 48)), load_vlm(key, tiny / key)
    ranker = Ranker(vlm, names, WORDINGS["base"])
    assert [len(ids) for ids in ranker.tokens.ids] == [1] * len(names)
    scores = np.exp(ranker.log_probs([image])[0].astype(float))
    template = f"{{{{ {json.dumps(ranker.prompt)} }}}}{{{{ '' if state and question else '' }}}}"
    config = DecisionConfig(labels={"choice": [f" {name}" for name in names]}, chat_template=template,
                            sanitize_control_tokens=False)  # fmt: skip
    decide = pipeline("decision", model=vlm.model, tokenizer=vlm.processor.tokenizer, processor=vlm.processor,
                      decision_config=config)  # fmt: skip
    question = {"type": "choice", "criteria": dict.fromkeys(names)}
    found = decide({"state": "image-1", "assets": {"image-1": image}, "questions": {"name": question}})
    for name, score in zip(names, scores / scores.sum(), strict=True):
        assert found["name"]["probabilities"][name] == pytest.approx(score, abs=1e-4)


def test_verbs_take_paths_and_single_images(tiny, tmp_path):
    """dir() lists the verbs; a path, an image and a list of one give the same; other types get a sentence."""
    import vlmclassifier

    assert dir(vlmclassifier) == ["load_clip", "load_vlm", "open_image", "rank_names"]
    image, file = noise((64, 48)), tmp_path / "a.png"
    image.save(file)
    vlm = vlmclassifier.load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    assert vlm.ask(str(file), "What?") == vlm.ask(file, "What?") == vlm.ask(image, "What?")
    found = vlmclassifier.rank_names(vlm, file, ["cat", "dog", "cat"])
    assert sum(found.values()) == pytest.approx(1) and list(found.values()) == sorted(found.values(), reverse=True)
    clip = vlmclassifier.load_clip("clip-vit-l-336", tiny / "clip-vit-l-336")
    features = clip.class_features(["cat", "dog"])
    assert clip.classify(file, features) == clip.classify([image], features) == clip.classify(image, features)
    for wrong in (3, [3], None, np.zeros((3, 3))):
        with pytest.raises(UserError, match="is no image: give a path, a PIL image, or a list of them"):
            clip.classify(wrong, features)
        with pytest.raises(UserError, match="is no image"):
            vlm.ask(wrong, "What?")
    with pytest.raises(UserError, match="One name alone"):
        vlmclassifier.rank_names(vlm, image, ["cat", " cat ", ""])
    with pytest.raises(UserError, match="A question is a text"):
        vlm.ask(image, 3)
    with pytest.raises(UserError, match="One name alone"):
        vlmclassifier.rank_names(vlm, image, "cat")
    with pytest.raises(UserError, match="nothing.png"):
        vlm.ask("nothing.png", "What?")
