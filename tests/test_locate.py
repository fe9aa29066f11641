"""Protects: the logit lens at the last layer is the ranking, for every family; its script resumes."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import noise, script
from PIL import Image
from test_families import FAMILIES
from test_features import extract
from test_ranking import NAMES, QUESTION, two_images

from vlmclassifier import load_vlm
from vlmclassifier.ranking import Ranker
from vlmclassifier.ranking.lens import FINAL_NORMS, lens_log_probs
from vlmclassifier.ranking.patching import (
    POSITIONS,
    draw_donors,
    patched_log_probs,
    prompt_lengths,
    run_donors,
)
from vlmclassifier.ranking.ranker import root_log_probs
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


@pytest.mark.parametrize("key", FAMILIES)
def test_patching_is_the_identity_or_the_donor_where_it_must_be(key, tiny):
    """With itself; all positions of the embeddings, or the text's; the last token behind the last layer."""
    ranker = Ranker(load_vlm(key, tiny / key), NAMES, QUESTION)
    recipients, donors = (ranker.prepare([noise((64, 64), seed)]) for seed in (0, 1))
    own, others = ranker.log_probs(recipients), ranker.log_probs(donors)
    itself, donors = run_donors(ranker, recipients), run_donors(ranker, donors)
    layers = len(ranker.decoder.decoder.layers)
    for layer in range(layers + 1):
        for positions in POSITIONS:
            same = patched_log_probs(ranker, recipients, itself, layer, positions)
            assert np.abs(same - own).max() <= 2e-5, (layer, positions)
    assert np.abs(own - others).max() > 0.01
    assert np.abs(patched_log_probs(ranker, recipients, donors, 0, "all") - others).max() <= 2e-5
    # Before the first layer, the text is the same whatever the image.
    assert np.abs(patched_log_probs(ranker, recipients, donors, 0, "text") - own).max() <= 2e-5
    last = patched_log_probs(ranker, recipients, donors, layers, "last")
    first = {}  # the log-probability of a name's first token
    for name, batch in (("donor", donors.batch), ("recipient", recipients)):
        first[name] = root_log_probs(ranker.trie, ranker.prefill(batch))[0]  # [edges]
    place = {node: number for number, node in enumerate(ranker.trie.children(np.zeros(1, dtype=int))[0].tolist())}
    for name, node in enumerate(ranker.trie.name_node):
        edge = place[[*ranker.trie.ancestors(node), node][0]]
        rest = own[0, name] - first["recipient"][edge]  # later tokens read the recipient's cache
        assert abs(last[0, name] - first["donor"][edge] - rest) <= 5e-5
    other_size = ranker.prepare([noise((200, 64), 2)])
    if prompt_lengths(other_size) != prompt_lengths(recipients):
        with pytest.raises(UserError, match="equally many tokens"):
            patched_log_probs(ranker, recipients, run_donors(ranker, other_size), 0, "all")
    decoder = ranker.decoder.decoder
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (decoder, *decoder.layers))


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
        ("middle", "2", "1"), ("rare", "1", "0"), ("rare", "2", "0"),
    ]  # fmt: skip
    assert read_values(tmp_path / "run")[1]["values"].shape == (3, 2)
    shares = (tmp_path / "run" / "lens.csv").read_text()
    (tmp_path / "counts.csv").write_text("class,stage,count\ncat,total,100\ncat,one,1\ndog,one,1\nhorse,one,50\n"
                                         "dog,total,10\nhorse,total,1\nhorse,two,60\n")  # fmt: skip
    module.main(module.Args(**settings, frequency=tmp_path / "counts.csv"))  # the total alone
    assert (tmp_path / "run" / "lens.csv").read_text() == shares
    for text, message in (
        ("class,count\ncat,100\n", "counts.csv has no count of 'dog', and of 1 other classes"),
        ("class,count\ncat\n", "counts.csv is no CSV file with the columns class and count"),
        ("class,count\ncat,1\ndog,2\nhorse,3\ncat,4\n", "counts.csv has 'cat' twice"),
    ):
        (tmp_path / "counts.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            module.main(module.Args(**settings, frequency=tmp_path / "counts.csv"))


def test_the_script_patches_pairs(tiny, own, tmp_path, monkeypatch):
    module = script("feature_analysis/locate.py")
    # A random model ranks one name first for every image, so the donors are given: the next image of each.
    next_of = lambda ids, *rest: [(place + 1) % len(ids) for place in range(len(ids))]  # noqa: E731
    monkeypatch.setattr("vlmclassifier.ranking.patching.draw_donors", next_of)
    letters = list("abcdefghijklmnopqrst")
    own.classes.write_text(json.dumps(letters))
    own.rows = [{"image": f"{i}.png", "label": letters[i % 2], "split": "test"} for i in range(12)]
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 255 - 20 * i, 120 * (i % 3))).save(own.folder / f"{i}.png")
    own.write()
    counts = "".join(f"{name},{number}\n" for number, name in enumerate(letters))
    (tmp_path / "counts.csv").write_text("class,count\n" + counts)
    settings = {"weights": tiny / "llava-1.5-7b", **own.args}
    for batch_size in (1, 5):
        module.main(module.Args(what="patch", out=tmp_path / f"run-{batch_size}", batch_size=batch_size,
                                frequency=tmp_path / "counts.csv", **settings))  # fmt: skip
    one, five = (tmp_path / f"run-{number}" for number in (1, 5))
    assert (one / "predictions.jsonl").read_bytes() == (five / "predictions.jsonl").read_bytes()
    assert (one / "patch.csv").read_bytes() == (five / "patch.csv").read_bytes()
    with pytest.raises(UserError, match="another configuration .donor_pool"):  # its donors are others
        module.main(module.Args(what="patch", out=one, limit=6, **settings))
    with open(one / "patch.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["classes"] == "all"]
    shares = {(row["positions"], row["layer"]): row["accuracy"] for row in rows}
    assert shares["all", "0"] == "100.000" and set(shares) == {(p, str(layer)) for p in POSITIONS for layer in range(3)}


def test_donors_have_another_top_name_and_depend_on_the_image_alone():
    ids, labels, tops = [f"{i}.png" for i in range(20)], list("aabb" * 5), [i % 3 for i in range(20)]
    lengths = [5] * 12 + [6] * 8
    for same_class in (False, True):
        donors = draw_donors(ids, labels, tops, lengths, same_class, seed=0)
        for number, donor in enumerate(donors):
            assert tops[donor] != tops[number] and (labels[donor] == labels[number]) == same_class
            assert lengths[donor] == lengths[number]
        assert donors != draw_donors(ids, labels, tops, lengths, same_class, seed=1)
    assert draw_donors(["a", "b"], ["x", "x"], [0, 0], [9, 9], True, 0) == [None, None]
    assert draw_donors(["a", "b"], ["x", "x"], [0, 1], [9, 8], True, 0) == [None, None]


def test_images_of_other_shapes_are_no_pair(tiny):
    """Also where the number of tokens is the same: 2 x 8 patches and 8 x 2."""
    ranker = Ranker(load_vlm("qwen2.5-vl-7b", tiny / "qwen2.5-vl-7b"), NAMES, QUESTION)
    wide, high = (ranker.prepare([noise(size)]) for size in ((112, 28), (28, 112)))
    assert torch.equal(wide.inputs["input_ids"], high.inputs["input_ids"])
    assert prompt_lengths(wide) != prompt_lengths(high)
    with pytest.raises(UserError, match="equally many tokens"):
        patched_log_probs(ranker, wide, run_donors(ranker, high), 0, "all")


def test_patching_leaves_the_layers_below_alone(tiny):
    """Qwen3-VL adds image features behind its first two layers: a donor's only from the patched layer on."""
    ranker = Ranker(load_vlm("qwen3-vl-8b", tiny / "qwen3-vl-8b"), NAMES, QUESTION)
    recipients, donors = (ranker.prepare([noise((64, 64), seed)]) for seed in (0, 1))
    seen = []  # what the second layer reads
    layer = ranker.decoder.decoder.layers[1]
    handle = layer.register_forward_pre_hook(
        lambda module, arguments, options: seen.append(options.get("hidden_states", *arguments[:1])), with_kwargs=True
    )
    run_donors(ranker, recipients)
    donors = run_donors(ranker, donors)
    own, others = seen
    for number in (1, 2):
        seen.clear()
        patched_log_probs(ranker, recipients, donors, number, "all")
        assert torch.equal(seen[0], others if number == 1 else own)
    handle.remove()
    assert len(donors.deepstack) == 2 and not torch.equal(own, others)


def test_attention_heads_stand_beside_a_probe_and_tip_adapter(tiny, own, tmp_path, capsys):
    own.rows = [{"image": f"{i}.png", "label": ["cat", "dog"][i % 2], "split": "train" if i < 12 else "test"}
                for i in range(20)]  # fmt: skip
    for i in range(20):
        colour = (200, 30 + i, 20) if i % 2 else (20, 30 + i, 200)
        Image.new("RGB", (40, 40), colour).save(own.folder / f"{i}.png")
    own.write()
    for model, more in (("llava-1.5-7b", {"heads": True}), ("clip-vit-l-336", {})):
        for split in ("train", "test"):
            extract(tmp_path / f"{model}-{split}", tiny / model, model, split=split, **more, **own.args)
    module = script("feature_analysis/locate.py")
    folders = {
        "train": tmp_path / "llava-1.5-7b-train",
        "test": tmp_path / "llava-1.5-7b-test",
        "clip_train": tmp_path / "clip-vit-l-336-train",
        "clip_test": tmp_path / "clip-vit-l-336-test",
    }
    capsys.readouterr()
    module.main(module.Args(what="heads", shots=4, out=tmp_path / "runs" / "h", **folders))
    printed = capsys.readouterr().out
    module.main(module.Args(what="heads", shots=4, out=tmp_path / "runs" / "h", **folders))
    assert capsys.readouterr().out == printed
    for setting in (
        "heads_1-4_shots",
        "heads_all-4_shots",
        "last_token-logistic-4_shots",
        "linear-tip_adapter-4_shots",
    ):
        assert f"{setting}, mine: accuracy 100.0%" in printed, setting
    table = script("feature_analysis/table.py")
    table.main(table.Args(outputs=tmp_path / "runs"))
    assert "heads_1-4_shots" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no attention heads: extract its features with --heads"):
        module.main(module.Args(what="heads", train=folders["clip_train"], test=folders["clip_test"]))
    with pytest.raises(UserError, match="needs --train and --test"):
        module.main(module.Args(what="heads", train=folders["clip_train"]))
