"""Protects: hidden states equal plain transformers', probes follow a plain loop, and features of two runs never mix."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import noise, run_script, script
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import FAMILIES
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from vlmclassifier import load_vlm, probing
from vlmclassifier.probing.data import Scale
from vlmclassifier.probing.gradient import Inputs
from vlmclassifier.records import Score, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.runs.features import SHARD_ROWS, Features, Matrix, read_header
from vlmclassifier.vlm.controls import CONTROLS, untrain, use_text_only_language_model
from vlmclassifier.vlm.hidden import HEADS, VISION, FeatureExtractor, layer_names
from vlmclassifier.vlm.parts import find_projector, innermost_decoder, is_vision_encoder

QUESTION = "What type of object is in this photo?"


def extract(out, weights, model="llava-1.5-7b", **options):
    module = script("feature_analysis/extract_features.py")
    module.main(module.Args(model, weights, out=out, **options))
    return Features(out)


def all_of(features, name):
    """One feature of all rows [rows, width]."""
    return features.matrix(name)[:]


@pytest.mark.parametrize("key", FAMILIES)
def test_hidden_states_equal_plain_transformers(key, tiny):
    """Every layer of single images, and a batch of images with different numbers of tokens."""
    vlm, images = load_vlm(key, tiny / key), [noise((90, 60), 0), noise((61, 130), 1)]
    prompt = vlm.prompt(QUESTION)
    extractor = FeatureExtractor(vlm, (0, -2), [VISION, HEADS, *layer_names(vlm)])
    batched = extractor(vlm.prepare(images, [prompt] * 2))
    model = AutoModelForImageTextToText.from_pretrained(tiny / key).eval()
    for row, image in enumerate(images):
        batch = vlm.prepare([image], [prompt])
        with torch.no_grad(), inputs_of_projector(model) as vision:
            outputs = model(**batch.inputs, output_hidden_states=True, use_cache=False)
        outputs = getattr(outputs, "language_model_outputs", outputs)
        single = extractor(batch)
        is_image = batch.inputs["input_ids"][0] == model.config.image_token_id
        *inner, last = outputs.hidden_states  # the last of them is behind the final norm
        expected = {f"layer_{number}.": states[0] for number, states in enumerate(inner)} | {"": last[0]}
        start, end = is_image.nonzero()[0, 0], is_image.nonzero()[-1, 0] + 1
        for prefix, states in expected.items():
            means = {"last_token": states[-1], "avg_token": states.mean(dim=0),
                     "image_token": states[is_image].mean(dim=0)}  # fmt: skip
            if prefix:
                means["text_behind_image"] = states[end:-1].mean(dim=0)
            if prefix and start:
                means["text_before_image"] = states[:start].mean(dim=0)
            for kind, values in means.items():
                assert (single[f"{prefix}{kind}"][0] - values).abs().max() <= 1e-5, (prefix, kind)
        assert ("layer_1.text_before_image" in single) == bool(start)
        for position in (0, -2):
            assert (single[f"position_{position}"][0] - last[0, position]).abs().max() <= 1e-5
        width = vision[0].shape[-1]
        assert (single["layer_vision.image_token"][0] - vision[0].reshape(-1, width).mean(dim=0)).abs().max() <= 1e-5
        for name, values in batched.items():
            assert (values[row] - single[name][0]).abs().max() <= 2e-5, name
    decoder = innermost_decoder(vlm.model)
    layer, projection = decoder.layers[-1], decoder.layers[-1].self_attn
    assert single[HEADS].shape == (1, len(decoder.layers) * layer.self_attn.q_proj.out_features)
    projection = getattr(projection, "o_proj", None) or projection.out_proj
    with torch.no_grad(), inputs_of(projection) as heads:
        model = vlm.model(**batch.inputs)
    assert (single[HEADS][0, -heads[0].shape[-1] :] - heads[0][0, -1]).abs().max() <= 1e-5
    modules = (decoder, *decoder.layers, projection, find_projector(vlm.model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    with pytest.raises(UserError, match="Position 900 is outside of a prompt"):
        FeatureExtractor(vlm, (900,))(batch)
    assert not any(module._forward_hooks for module in modules)


@contextmanager
def inputs_of(module):
    """Within it, the first argument of every call of a module is appended to the yielded list."""
    found = []
    keep = lambda module, arguments, options: found.append(  # noqa: E731
        options["encoder_hidden_states"] if "encoder_hidden_states" in options else arguments[0]
    )
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    yield found
    handle.remove()


def inputs_of_projector(model):
    return inputs_of(find_projector(model))


def test_a_batch_that_does_not_fit_is_split(tiny, monkeypatch):
    vlm, images = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b"), [noise((40, 40), seed) for seed in range(3)]
    batch = vlm.prepare(images, [vlm.prompt(QUESTION)] * 3)
    expected, calls = FeatureExtractor(vlm)(batch), []
    forward = vlm.model.forward

    def small(**inputs):
        calls.append(len(inputs["input_ids"]))
        if calls[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(**inputs)

    monkeypatch.setattr(vlm.model, "forward", small)
    found = FeatureExtractor(vlm)(batch)
    assert calls == [3, 2, 1] and all((found[name] - expected[name]).abs().max() <= 1e-5 for name in expected)


def test_shards_are_the_same_after_a_kill_and_with_a_larger_limit(tiny, own, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmclassifier.runs.features.SHARD_ROWS", 2)
    module = script("feature_analysis/extract_features.py")
    monkeypatch.setattr(module, "SHARD_ROWS", 2)
    own.rows = [{"image": f"{i}.png", "label": ["cat", "dog"][i % 2], "split": "test"} for i in range(7)]
    for i in range(7):
        noise((30, 20), i).save(own.folder / f"{i}.png")
    own.write()
    options = {"batch_size": 1, **own.args}
    whole = extract(tmp_path / "whole", tiny / "llava-1.5-7b", **options)
    assert len(whole.shards) == 4 and len(whole.rows) == 7
    with pytest.raises(UserError, match="is unfinished"), monkeypatch.context() as patch:
        patch.setattr(module, "extract", lambda *arguments: None)
        extract(tmp_path / "run", tiny / "llava-1.5-7b", **options)
    shutil.copy(whole.shards[1], tmp_path / "run")  # what a killed run may leave
    damaged = tmp_path / "run" / whole.shards[0].name
    damaged.write_bytes(whole.shards[0].read_bytes()[:-9])
    again = extract(tmp_path / "run", tiny / "llava-1.5-7b", **options)
    assert [shard.read_bytes() for shard in again.shards] == [shard.read_bytes() for shard in whole.shards]
    assert [row.example_id for row in again.rows] == [row.example_id for row in whole.rows]
    limited = extract(tmp_path / "limit", tiny / "llava-1.5-7b", **options, limit=3)
    assert len(limited.rows) == 3
    larger = extract(tmp_path / "limit", tiny / "llava-1.5-7b", **options)
    assert larger.rows == whole.rows  # in the evaluation order, whatever the shards hold
    assert torch.equal(all_of(larger, "last_token"), all_of(whole, "last_token"))


@pytest.mark.parametrize("key", ["llava-1.5-7b", "blip2-2.7b", "qwen3-vl-8b", "internvl3-8b"])
def test_an_untrained_control_keeps_the_vision_encoder_alone(key, tiny):
    """Two seeds differ, one seed repeats itself; permuted matrices keep their entries."""
    assert is_vision_encoder("model.visual.blocks.0.attn.qkv.weight")
    assert not is_vision_encoder("model.visual.merger.linear_fc1.weight")  # the projector
    trained = load_vlm(key, tiny / key).model.state_dict()
    for control in CONTROLS[:2]:
        states = []
        for seed in (0, 0, 1):
            vlm = load_vlm(key, tiny / key)
            untrain(vlm, control, seed)
            states.append(vlm.model.state_dict())
        first, again, other = states
        assert all(torch.equal(first[name], again[name]) for name in first)
        for name, tensor in first.items():
            if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.std() == 0:
                continue
            is_kept = torch.equal(tensor, trained[name])
            assert is_kept == is_vision_encoder(name), name
            assert is_kept or not torch.equal(tensor, other[name])
            if control == "permuted":
                assert torch.equal(tensor.flatten().sort().values, trained[name].flatten().sort().values)
            if name.endswith("query_tokens"):  # of BLIP-2: zeros in a new model, so that all image tokens are the same
                assert tensor.std() > 0


def test_the_text_only_control_has_the_language_model_before_visual_training(tiny, own, tmp_path):
    """And the trained projector; a checkpoint of another model is refused."""
    key = "llava-1.5-7b"
    trained, before = load_vlm(key, tiny / key), load_vlm(key, tiny / key)
    config = LlamaConfig(**trained.model.config.text_config.to_dict() | {"vocab_size": 500})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    use_text_only_language_model(before, tmp_path / "lm")
    source = LlamaForCausalLM.from_pretrained(tmp_path / "lm").state_dict()
    for name, tensor in before.model.state_dict().items():
        short = name.replace("model.language_model.", "model.")
        if "language_model" not in name and name != "lm_head.weight":
            assert torch.equal(tensor, trained.model.state_dict()[name])
            continue
        assert torch.equal(tensor[: len(source[short])], source[short])
        assert torch.equal(tensor[len(source[short]) :], trained.model.state_dict()[name][len(source[short]) :])
    features = extract(tmp_path / "run", tiny / key, control="text_only", language_model=tmp_path / "lm", **own.args)
    assert "untrained: text_only" in features.config["tags"]
    config.hidden_size = 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="use the language model that the VLM was made of"):
        use_text_only_language_model(before, tmp_path / "small")
    with pytest.raises(UserError, match="is no checkpoint of a language model"):
        use_text_only_language_model(before, tmp_path)
    with pytest.raises(UserError, match="--language-model DIR go together"):
        extract(tmp_path / "none", tiny / key, control="text_only", **own.args)


def test_pixels_are_a_baseline(own, tmp_path):
    features = extract(tmp_path / "run", None, "pixels", **own.args)
    rows = {row.example_id: values for row, values in zip(features.rows, all_of(features, "image"), strict=True)}
    expected = torch.tensor([160, 10, 10]) / 255  # an image of one colour
    assert torch.equal(rows["2.png"].view(256, 3), expected.expand(256, 3))
    with pytest.raises(UserError, match="pixels is no vision-language model"):
        extract(tmp_path / "layers", None, "pixels", layers=("all",), **own.args)


def test_a_changed_manifest_neither_overwrites_features_nor_counts_removed_rows(own, tmp_path):
    def run(*numbers):
        own.rows = [{"image": f"{i}.png", "label": ["cat", "dog"][i % 2], "split": "test"} for i in numbers]
        own.write()
        features = extract(tmp_path / "run", None, "pixels", **own.args)
        return {row.example_id: values for row, values in zip(features.rows, all_of(features, "image"), strict=True)}

    for i in range(6):
        Image.new("RGB", (30, 20), (40 * i, 10, 10)).save(own.folder / f"{i}.png")
    red = lambda found: {i: round(float(values[0]) * 255 / 40) for i, values in found.items()}  # noqa: E731
    assert red(run(2, 3)) == {"2.png": 2, "3.png": 3}
    assert red(run(0, 1, 2, 3, 4, 5)) == {f"{i}.png": i for i in range(6)}  # rows in front of and behind the others
    assert red(run(1, 3, 5)) == {"1.png": 1, "3.png": 3, "5.png": 5}


def test_a_damaged_shard_is_named_and_computed_again(pair, tiny, tmp_path, capsys):
    folder = shutil.copytree(pair[0] / "test", tmp_path / "test")
    shard = next(folder.glob("features-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=f"The shard {shard} cannot be read"):
        probe(pair, tmp_path, test=folder)
    extract(folder, tiny / "llava-1.5-7b", split="test", **pair[1])
    assert shard.read_bytes() == whole and f"{shard} cannot be read" in capsys.readouterr().err


def test_features_of_a_control_are_not_those_of_the_model(pair, tiny, tmp_path):
    folder, options = pair
    control = extract(tmp_path / "control", tiny / "llava-1.5-7b", split="test", control="random", **options)
    assert "untrained: random" in control.config["tags"]
    assert not torch.equal(all_of(control, "last_token"), all_of(Features(folder / "test"), "last_token"))
    with pytest.raises(UserError, match="their control differs"):
        probe(pair, tmp_path, test=tmp_path / "control")


def test_features_of_clip_are_its_embeddings(tiny, own, tmp_path):
    from vlmclassifier import load_clip, open_image

    features = extract(tmp_path / "run", tiny / "clip-vit-l-336", "clip-vit-l-336", **own.args)
    images = [open_image(own.folder / row.example_id) for row in features.rows]
    expected = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336").encode_images(images)
    assert (all_of(features, "image") - expected).abs().max() <= 1e-6
    folder = shutil.copytree(tiny / "clip-vit-l-336", tmp_path / "my-clip")  # not registered
    features = extract(tmp_path / "own", None, str(folder), kind="clip", **own.args)
    assert (all_of(features, "image") - expected).abs().max() <= 1e-6


@pytest.mark.slow
def test_two_processes_share_the_features(tiny, images, tmp_path):
    flags = ["--model", "llava-1.5-7b", "--weights", tiny / "llava-1.5-7b", "--benchmark", "caltech", "--split", "all",
             "--data-root", images, "--limit", SHARD_ROWS + 30]  # fmt: skip
    path = "feature_analysis/extract_features.py"
    run_script("bash", "scripts/multi_gpu.sh", path, *flags, "--out", tmp_path / "two", env={"PROCESSES": "2"})
    run_script(path, *flags, "--out", tmp_path / "one")
    one, two = Features(tmp_path / "one"), Features(tmp_path / "two")
    assert [shard.read_bytes() for shard in one.shards] == [shard.read_bytes() for shard in two.shards]


def made_up(classes=5, per_class=40, width=16, noise_level=0.5, seed=0):
    """Features [rows, width] around a centre for each class, and the classes [rows]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    return centres[labels] + noise_level * torch.randn(len(labels), width, generator=generator), labels


def split(features, labels, test, parts=1):
    """Probe data of tensors, the train rows in several parts as in shards, and the ids of the train rows."""
    ids = [f"{row}.png" for row in range(len(labels))]
    held_out = probing.held_out_rows(ids, labels.tolist(), seed=0)
    numbers = torch.arange(len(labels))
    train = Matrix([features[part::parts] for part in range(parts)], numbers % parts, numbers // parts)
    return probing.ProbeData(train, labels, held_out, Matrix.of(test), int(labels.max()) + 1), ids


@pytest.mark.parametrize("hidden", [False, True])
def test_the_papers_probe_equals_a_plain_loop(hidden, monkeypatch):
    """Also where features, learning rates and seeds are trained together, in several batches an epoch."""
    monkeypatch.setattr("vlmclassifier.probing.gradient.BATCH", 64)
    features, labels = made_up()
    features = [features, features.flip(1) * 2]
    test, _ = made_up(seed=1)
    inputs, seen = Inputs([Matrix.of(values) for values in features], "cpu"), []
    tests = Inputs([Matrix.of(test), Matrix.of(test.flip(1) * 2)], "cpu")
    rates, seeds = (1e-3, 1e-2), (0, 2)
    for stack in probing.train_probes(inputs, labels, 5, 20, rates, seeds, hidden):
        seen.append((stack.losses.clone(), stack.predict(tests)))  # [features, probes], [features, probes, rows]
    for place, (feature, (rate, seed)) in enumerate(product((0, 1), product(rates, seeds))):
        probe = probing.build_probe(16, 5, hidden, seed)
        optimiser = torch.optim.Adam(probe.parameters(), lr=rate)
        for losses, predictions in seen:
            total = 0.0
            for start in range(0, len(labels), 64):
                part = labels[start : start + 64]
                loss = F.cross_entropy(probe(features[feature][start : start + 64]), part)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item() * len(part) / len(labels)
            assert abs(losses[feature, place % 4] - total) <= 1e-5
            with torch.no_grad():
                expected = probe(tests.features[feature][:]).argmax(dim=1)
            assert torch.equal(expected, predictions[feature, place % 4].long())


def test_every_probe_learns_and_chooses_without_the_test_rows():
    features, labels = made_up()
    test, truth = made_up(seed=1)
    data, ids = split(features, labels, test, parts=3)
    assert torch.bincount(labels[data.held_out]).tolist() == [4] * 5
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3))
    shuffled = probing.held_out_rows([ids[row] for row in order], labels[order].tolist(), seed=0)
    assert torch.equal(shuffled, data.held_out[order])  # by the id, not by the place
    flipped = replace(data, test=Matrix.of(test.flip(0)))
    probes = [probing.logistic_probe, probing.neighbour_probe, probing.centroid_probe,
              lambda data: probing.grid_probes([data], 60)[0].result]  # fmt: skip
    for function in probes:
        result, permuted = function(data), function(flipped)
        assert (result.predictions == truth).float().mean() > 0.9
        assert permuted.choice == result.choice and torch.equal(permuted.predictions.flip(0), result.predictions)
    rows = probing.few_shot_rows(ids, labels.tolist(), 3, seed=0)
    assert torch.bincount(labels[rows]).tolist() == [3] * 5
    assert rows.tolist() != probing.few_shot_rows(ids, labels.tolist(), 3, seed=1).tolist()
    assert torch.equal(data.train.subset(rows)[:], features[rows])


def test_the_papers_probe_chooses_its_epoch_on_held_out_rows():
    """And the paper's rule the one that is best on the test rows."""
    features, labels = made_up(noise_level=2.5)
    test, truth = made_up(noise_level=2.5, seed=1)
    data, _ = split(features, labels, test)
    (result,) = probing.paper_probes([data], truth, 60)[0]
    held_out, predictions = [], []
    for stack in probing.train_probes(Inputs([data.inner[0]], "cpu"), data.inner[1], 5, 60):
        held_out.append(int((stack.predict(Inputs([data.outer[0]], "cpu")) == data.outer[1]).sum()))
    for stack in probing.train_probes(Inputs([data.train], "cpu"), labels, 5, 60):
        predictions.append(stack.predict(Inputs([data.test], "cpu"))[0, 0])
    right = [int((prediction == truth).sum()) for prediction in predictions]
    for kind, epoch in (("held_out", held_out.index(max(held_out))), ("papers", right.index(max(right))), ("last", 59)):
        assert f"epoch {epoch + 1} of 60" in getattr(result, kind).choice
        assert torch.equal(getattr(result, kind).predictions, predictions[epoch])
    assert len({result.held_out.choice, result.papers.choice[18:], result.last.choice}) == 3
    alone = replace(data, held_out=torch.zeros_like(data.held_out))
    assert probing.paper_probes([alone], truth, 2)[0][0].held_out is None


def test_probes_equal_scikit_learn(monkeypatch):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    features, labels = made_up(noise_level=2)
    test, _ = made_up(noise_level=2, seed=1)
    features[:, 0], test[:, 0] = 7.3, 7.3  # a number that never changes
    scaler = StandardScaler().fit(features)
    expected = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(scaler.transform(features), labels)
    scale = Scale.of(Matrix.of(features))
    monkeypatch.setattr("vlmclassifier.probing.classifiers.TOLERANCE", 1e-6)
    weight, bias = probing.fit_logistic(Matrix.of(features), labels, 5, 0.1, scale)
    assert torch.equal(scale(features)[:, 0], torch.zeros(len(features)))
    ours = scale(test) @ weight + bias
    theirs = torch.tensor(expected.decision_function(scaler.transform(test)))
    assert ((ours - ours.mean(dim=1, keepdim=True)) - (theirs - theirs.mean(dim=1, keepdim=True))).abs().max() < 5e-3
    data, _ = split(features, labels, test)
    result = probing.neighbour_probe(data)
    k = int(result.choice.removeprefix("k = "))
    expected = KNeighborsClassifier(k, metric="cosine").fit(features, labels).predict(test)
    assert (result.predictions.numpy() == expected).all()


def test_heads_vote_and_a_cache_helps_clip():
    """Of 6 heads two know the class; a cache of train images adds to weak class features."""
    features, labels = made_up(width=8)
    test, truth = made_up(width=8, seed=1)
    random = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(5))
    data, _ = split(*(torch.cat([random, part, random * 2, part.flip(0) * 0 + part], dim=1) if part.ndim == 2 else part
                      for part in (features, labels, test)))  # fmt: skip
    found = probing.head_probe(data, 6)
    accuracy = {name: float((result.predictions == truth).float().mean()) for name, result in found.items()}
    assert list(found) == ["1", "4", "all"] and accuracy["1"] > 0.9 > accuracy["all"] + 0.1
    assert found["1"].choice.startswith(("heads 2, 5", "heads 5, 2"))
    centres = torch.stack([features[labels == index].mean(dim=0) for index in range(5)])
    weak = F.normalize(centres + 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    data, _ = split(features, labels, test)
    zero_shot = (F.normalize(test, dim=1) @ weak.T).argmax(dim=1)
    result = probing.tip_adapter(data, weak)
    assert (result.predictions == truth).float().mean() > (zero_shot == truth).float().mean() + 0.05


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """Features of two splits of one small benchmark, and the folder of its files."""
    folder = tmp_path_factory.mktemp("pair")
    rows = []
    for number in range(24):
        noise((30, 20), number).save(folder / f"{number}.png")
        split = "train" if number < 16 else "test"
        rows.append({"image": f"{number}.png", "label": ["cat", "dog"][number % 2], "split": split})
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "classes.json").write_text('["cat", "dog", "horse"]')
    options = {"benchmark": str(folder / "mine.jsonl"), "classes": folder / "classes.json"}
    for split in ("train", "test"):
        extract(folder / split, tiny / "llava-1.5-7b", split=split, **options)
    return folder, options


def probe(pair, tmp_path, **options):
    module = script("feature_analysis/probe.py")
    folder = pair[0]
    settings = {"train": folder / "train", "test": folder / "test", "out": tmp_path / "runs" / "p", "epochs": 3}
    module.main(module.Args(**settings | options))


def test_probes_are_runs_that_the_table_shows(pair, tmp_path, capsys):
    probe(pair, tmp_path, method=("paper", "logistic", "centroid"), features=("last_token",))
    probe(pair, tmp_path, method=("paper",), features=("last_token",), mlp=True)
    probe(pair, tmp_path, method=("centroid",), features=("avg_token",), shots=(1, 2))
    probe(pair, tmp_path, method=("centroid",), features=("avg_token",), shots=(2,), seeds=(1,))
    probe(pair, tmp_path, method=("grid",), features=("avg_token", "last_token"))
    settings = {"last_token", "last_token-held_out", "last_token-last_epoch", "last_token-logistic",
                "last_token-centroid", "last_token-mlp", "last_token-mlp-held_out", "last_token-mlp-last_epoch",
                "avg_token-centroid-1_shots", "avg_token-centroid-2_shots",
                "avg_token-centroid-2_shots-seed_1", "last_token-grid", "avg_token-grid",
                "best_feature-grid"}  # fmt: skip
    assert {folder.name.removeprefix("p-") for folder in (tmp_path / "runs").iterdir()} == settings
    record, rows = read_run(tmp_path / "runs" / "p-last_token-held_out")
    assert record["config"]["chosen"].startswith("epoch") and {row.label for row in rows} == {"cat", "dog"}
    assert (tmp_path / "runs" / "p-last_token-held_out" / "classes.csv").exists()
    capsys.readouterr()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/predictions.jsonl")}
    probe(pair, tmp_path, method=("paper", "logistic"), features=("last_token", "avg_token"))
    printed = capsys.readouterr().out
    assert "1 of 2 features: the paper probe is finished" in printed and "last_token, " not in printed
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    table = script("feature_analysis/table.py")
    table.main(table.Args(outputs=tmp_path / "runs", all=True))
    printed = capsys.readouterr().out
    assert "| LLaVA1.5-7B (miniature, 3 epochs) | last_token-held_out" in printed and "missing (94.5)" in printed


def test_a_probe_of_other_images_is_replaced(pair, tiny, tmp_path, capsys):
    """As after a larger --limit of the features; with other epochs or another model it is refused."""
    notes = tmp_path / "runs" / "p-last_token" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("not a probe's")
    test = extract(tmp_path / "test", tiny / "llava-1.5-7b", split="test", limit=4, **pair[1])
    options = {"test": test.folder, "features": ("last_token",), "method": ("paper",)}
    probe(pair, tmp_path, **options)
    assert notes.exists()  # a folder without a run in it is not removed
    extract(tmp_path / "test", tiny / "llava-1.5-7b", split="test", **pair[1])
    probe(pair, tmp_path, **options)
    assert "Other images than in" in capsys.readouterr().out
    assert len(read_run(tmp_path / "runs" / "p-last_token")[1]) == 8
    with pytest.raises(UserError, match="holds a run of another configuration .epochs: 3 there, 4 now"):
        probe(pair, tmp_path, **options | {"epochs": 4})
    probe(pair, tmp_path, **options | {"method": ("centroid",), "epochs": 4})  # has no epochs
    capsys.readouterr()
    probe(pair, tmp_path, **options | {"method": ("centroid",)})
    assert "the centroid probe is finished" in capsys.readouterr().out


def test_the_best_feature_is_chosen_among_all_features(pair, tmp_path, capsys):
    """Also where single features are finished, and where a command stopped before the best one was written."""
    options = {"method": ("grid",), "features": ("avg_token", "last_token")}
    probe(pair, tmp_path, method=("grid",), features=("last_token",))
    probe(pair, tmp_path, **options)
    best = tmp_path / "runs" / "p-best_feature-grid"
    record, rows = read_run(best)
    assert record["config"]["features"] == ["avg_token", "last_token"]
    shutil.rmtree(best)
    kept = tmp_path / "runs" / "p-avg_token-grid" / "predictions.jsonl"
    before = kept.stat().st_mtime_ns
    probe(pair, tmp_path, **options)
    assert read_run(best)[0]["config"] == record["config"] and read_run(best)[1] == rows
    assert kept.stat().st_mtime_ns == before
    unfinished = json.loads((best / "run.json").read_text()) | {"finished": None}
    (best / "run.json").write_text(json.dumps(unfinished))
    capsys.readouterr()
    probe(pair, tmp_path, **options)  # as after a kill between its rows and its end
    assert read_run(best)[0]["finished"] and "finished" not in capsys.readouterr().out
    probe(pair, tmp_path, **options)
    assert "2 of 2 features: the grid probe is finished" in capsys.readouterr().out
    probe(pair, tmp_path, **options | {"features": ("last_token", "avg_token", "image_token")})
    assert "Other features than in" in capsys.readouterr().out
    assert read_run(best)[0]["config"]["features"] == ["avg_token", "image_token", "last_token"]


def test_of_equal_class_names_either_is_right(pair, tmp_path, capsys):
    """ImageNet has two classes "missile"."""
    module = script("feature_analysis/probe.py")
    train, test = (Features(pair[0] / split) for split in ("train", "test"))
    test.config["classes"] = ["horse", "dog", "cat", "cat"]
    predictions = torch.tensor([{"cat": 3, "dog": 1}[row.label] for row in test.rows])
    args = module.Args(train.folder, test.folder, out=tmp_path / "p")
    result = probing.ProbeResult(predictions, "nothing chosen")
    module.write_run(args, train, test, module.Answer("last_token", result))
    assert "accuracy 100.0%" in capsys.readouterr().out


def test_features_that_do_not_belong_together_are_refused(pair, tiny, tmp_path):
    folder, options = pair
    with pytest.raises(UserError, match="is among the train rows and the test rows"):
        probe(pair, tmp_path, test=folder / "train")
    other = shutil.copytree(tiny / "llava-1.5-7b", tmp_path / "other")
    (other / "note.txt").write_text("other weights")
    extract(tmp_path / "other-test", other, split="test", **options)
    with pytest.raises(UserError, match="do not belong together: their checkpoint differs"):
        probe(pair, tmp_path, test=tmp_path / "other-test")
    extract(tmp_path / "template", tiny / "llava-1.5-7b", split="test", template="llava-v1", **options)
    with pytest.raises(UserError, match="their template differs"):
        probe(pair, tmp_path, test=tmp_path / "template")
    changed = shutil.copytree(folder / "test", tmp_path / "changed")
    record = json.loads((changed / "run.json").read_text())
    record["config"]["manifest"] = "another"
    (changed / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="their manifest differs"):
        probe(pair, tmp_path, test=changed)
    extract(tmp_path / "one", tiny / "llava-1.5-7b", split="train", limit=1, **options)
    with pytest.raises(UserError, match="has test images but no train rows"):
        probe(pair, tmp_path, train=tmp_path / "one")
    with pytest.raises(UserError, match="has no feature 'median': it has avg_token"):
        probe(pair, tmp_path, features=("median",))
    with pytest.raises(UserError, match="is no run of feature_analysis/extract_features.py"):
        run = script("main_results/classify_clip.py")
        run.main(run.Args(weights=tiny / "clip-vit-l-336", out=tmp_path / "clip", **options))
        probe(pair, tmp_path, train=tmp_path / "clip")


def test_features_that_are_not_finite_are_refused_with_their_image(pair, tmp_path):
    broken = shutil.copytree(pair[0] / "test", tmp_path / "broken")
    shard = next(broken.glob("features-*"))
    rows = read_header(shard)
    tensors = load_file(shard)
    tensors["last_token"][1, 0] = torch.nan
    save_file(tensors, shard, metadata={"rows": json.dumps([list(row) for row in rows])})
    with pytest.raises(UserError, match=f"'last_token' is not finite for {rows[1].example_id}: remove"):
        probe(pair, tmp_path, test=broken, features=("last_token",))


def test_the_launchers_fill_the_tables_on_real_photographs(realdata, tiny, tmp_path, monkeypatch):
    """The whole section with a miniature LLaVA, a miniature BLIP-2 and a miniature CLIP."""
    models = ("llava-1.5-7b", "blip2-2.7b", "clip-vit-l-336")
    lines = ["[models]", *(f"'{key}' = '{tiny / key}'" for key in models), "[benchmarks]", f"caltech = '{realdata}'"]
    (tmp_path / "paths.toml").write_text("\n".join(lines))
    env = {"VLMCLASSIFIER_PATHS": str(tmp_path / "paths.toml"), "OUTPUTS": str(tmp_path / "out"), "EPOCHS": "3",
           "MODELS": " ".join(models), "BENCHMARKS": "caltech"}  # fmt: skip
    done = run_script("bash", "feature_analysis/probe.sh", env=env)
    tags = r"\(miniature, 120 of 4,331 images, 180 of 4,346 train images, 3 epochs\)"
    for row in (rf"BLIP2-2.7B {tags} +\| avg_token-held_out", rf"CLIP-L {tags} +\| linear "):
        assert re.search(row, done.stdout), row
    env |= {"MODELS": "llava-1.5-7b", "POSITIONS": "0 -2 -1", "LIMIT": "20"}
    done = run_script("bash", "feature_analysis/positions.sh", env=env)
    assert "position_-2-held_out" in done.stdout and "missing (52.9)" not in done.stderr
    env |= {"MODELS": "blip2-2.7b", "METHOD": "centroid"}
    done = run_script("bash", "feature_analysis/layers.sh", env=env)
    assert re.search(r"BLIP2-2.7B \(.*untrained: random, 180 of .*\| text_behind_image", done.stdout)
    for model in models[:2]:
        out = tmp_path / model
        run_script("feature_analysis/locate.py", "lens", "--model", model, "--benchmark", "caltech", "--limit", 6,
                   "--out", out, env=env)  # fmt: skip
        assert (out / "lens.csv").read_text().count(",caltech,all,") == 2  # layers
    heads = {split: tmp_path / f"heads-{split}" for split in ("train", "test")}
    for split, folder in heads.items():
        extract(folder, tiny / models[0], benchmark="caltech", data_root=realdata, split=split, heads=True)
    locate = script("feature_analysis/locate.py")
    locate.main(locate.Args(what="heads", shots=2, out=tmp_path / "runs" / "h", **heads))
    assert len(list((tmp_path / "runs").glob("*/classes.csv"))) == 3  # the best head, all four, and the probe
    # Miniatures rank one name first for every photograph, so the donors are given: the next image of each.
    next_of = lambda ids, *rest: [(place + 1) % len(ids) for place in range(len(ids))]  # noqa: E731
    monkeypatch.setattr("vlmclassifier.ranking.patching.draw_donors", next_of)
    for model in models[:2]:
        locate.main(locate.Args(what="patch", model=model, weights=tiny / model, benchmark="caltech",
                                data_root=realdata, limit=4, out=tmp_path / f"{model}-patch"))  # fmt: skip
        assert ",all,all,0,100.000," in (tmp_path / f"{model}-patch" / "patch.csv").read_text()


def test_the_table_names_the_template_that_matches_the_paper():
    """Of cells that were run with both; the paper's number for this one is 94.5."""
    import pandas as pd

    module = script("feature_analysis/table.py")
    papers = pd.read_csv(module.PAPER)

    def note(own, other, tags=()):
        rows = {"last_token": own, "last_token-llava-v1": other}
        scores = [Score("LLaVA1.5-7B", setting, "flowers", "accuracy", value, value - 1, value + 1, 6149, tags)
                  for setting, value in rows.items()]  # fmt: skip
        return module.template_notes(scores, papers)

    assert note(94.0, 80.0)[0].endswith("llava-v1 80.0 [79.0, 81.0]: the model's own template matches.")
    assert note(80.0, 95.0)[0].endswith(": llava-v1 matches.") and note(94.0, 95.0)[0].endswith(": both match.")
    assert note(80.0, 90.0)[0].endswith(": llava-v1 is nearer.")
    assert note(94.0, 80.0, ("miniature",)) == []
