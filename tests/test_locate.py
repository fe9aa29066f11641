"""Protects: the logit lens at the last layer is the ranking, for every family; its script resumes."""

import csv

import numpy as np
import pytest
import torch
from conftest import noise, script
from test_families import FAMILIES
from test_ranking import NAMES, QUESTION, two_images

from vlmclassifier import load_vlm
from vlmclassifier.ranking import Ranker
from vlmclassifier.ranking.lens import FINAL_NORMS, lens_log_probs
from vlmclassifier.records import UserError
from vlmclassifier.runs.vectors import read_values


@pytest.mark.parametrize("key", FAMILIES)
def test_the_lens_at_the_last_layer_equals_the_ranking(key, tiny):
    ranker = Ranker(load_vlm(key, tiny / key), NAMES, QUESTION, chunk=24)
    images = two_images()
    lens = lens_log_probs(ranker, images)  # [layers, images, names]
    assert len(lens) == len(ranker.decoder.decoder.layers)
    assert np.abs(lens[-1] - ranker.log_probs(images)).max() <= 2e-5
    assert np.abs(lens[0] - lens[-1]).max() > 0.1
    assert not any(layer._forward_hooks for layer in ranker.decoder.decoder.layers)


def test_the_lens_of_a_middle_layer_equals_plain_transformers(tiny):
    """The hidden states of a full pass over image, prompt and name, through norm and head."""
    vlm, image = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b"), noise((40, 40))
    ranker = Ranker(vlm, NAMES, QUESTION)
    lens = lens_log_probs(ranker, [image])
    decoder = ranker.decoder.decoder
    norm = next(getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name))
    for name in (0, 7, len(NAMES) - 1):
        inputs, ids = vlm.process([image], [ranker.prompt]), torch.tensor([ranker.tokens.ids[name]])
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            states = vlm.model(**inputs, output_hidden_states=True).hidden_states[1][0, start - 1 : -1]
            log_probs = vlm.model.lm_head(norm(states)).log_softmax(dim=-1)
        expected = log_probs.gather(1, ids[0, :, None]).sum().item()
        assert abs(lens[0, 0, name] - expected) <= 2e-5


def test_the_script_writes_the_accuracy_by_layer_and_third(tiny, own, tmp_path):
    module = script("feature_analysis/locate.py")
    own.classes.write_text('["cat", "dog", "horse"]')
    (tmp_path / "counts.csv").write_text("class,count\ncat,100\ndog,10\nhorse,1\n")
    settings = {"weights": tiny / "llava-1.5-7b", "out": tmp_path / "run", **own.args}
    module.main(module.Args(**settings, limit=2))
    module.main(module.Args(**settings, frequency=tmp_path / "counts.csv"))  # continues, and scores by thirds
    with open(tmp_path / "run" / "lens.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["classes"], row["layer"], row["n"]) for row in rows] == [
        ("all", "1", "3"), ("all", "2", "3"), ("frequent", "1", "2"), ("frequent", "2", "2"), ("middle", "1", "1"),
        ("middle", "2", "1"),
    ]  # fmt: skip
    assert read_values(tmp_path / "run")[1]["values"].shape == (3, 2)
    (tmp_path / "counts.csv").write_text("class,count\ncat,100\n")
    with pytest.raises(UserError, match="counts.csv has no count of 'dog', and of 1 other classes"):
        module.main(module.Args(**settings, frequency=tmp_path / "counts.csv"))
