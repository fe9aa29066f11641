"""Protects: mini models train reproducibly, load like other checkpoints, and equal plain transformers."""

import contextlib
import json
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, pretrain, script
from torch import nn

from vlmclassifier import load_clip, load_vlm, open_image
from vlmclassifier.benchmarks import BENCHMARKS, class_names, find_benchmark, load_examples
from vlmclassifier.mini.contrastive import contrastive_loss
from vlmclassifier.mini.corpus import Text, image_text, language_text, plane_figures_spec, vocabulary_texts
from vlmclassifier.mini.language import bpe_tokenizer, collate, encode, length_batches, word_tokenizer
from vlmclassifier.mini.optimisation import Optimisation, learning_rate_factor
from vlmclassifier.mini.recipes import RECIPES
from vlmclassifier.mini.stages import first_images_per_class, image_processor
from vlmclassifier.mini.time_budget import fit_steps
from vlmclassifier.mini.training_images import TrainingImages, augment, load_pixels, mix
from vlmclassifier.models import is_miniature
from vlmclassifier.plane_figures import FIGURES
from vlmclassifier.records import Example, UserError
from vlmclassifier.runs.provenance import fingerprint

CORPUS = plane_figures_spec()
QUESTION = "What type of object is in this photo?"


def first_images(figures_root, count=6):
    benchmark = find_benchmark("plane_figures")
    rows = load_examples(benchmark, class_names(benchmark), figures_root, "test")
    return [open_image(row.image) for row in rows[:count]]


def test_checkpoints_load_like_other_models(trained, figures_root):
    clip, vlm = load_clip("mini-clip", trained / "clip"), load_vlm("mini-llava", trained / "vlm")
    assert all(is_miniature(trained / stage) for stage in ("clip", "lm", "vlm"))
    names = list(FIGURES)
    ranking = clip.classify(first_images(figures_root), clip.class_features(names))
    assert len(ranking) == 6 and all(len(set(row)) == 5 for row in ranking)
    assert all(isinstance(vlm.ask(image, QUESTION), str) for image in first_images(figures_root, 2))


def test_the_vlm_has_exactly_clips_vision_encoder(trained):
    clip = load_clip("mini-clip", trained / "clip").model.vision_model.state_dict()
    vlm = load_vlm("mini-llava", trained / "vlm").model.model.vision_tower.state_dict()
    assert clip.keys() == vlm.keys() and all(torch.equal(clip[key], vlm[key]) for key in clip)


def test_clip_equals_plain_transformers(trained, figures_root):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(trained / "clip"), AutoTokenizer.from_pretrained(trained / "clip")
    images, captions = first_images(figures_root), [f"a photo of a {name}" for name in FIGURES]
    pixel_values = CLIPImageProcessor.from_pretrained(trained / "clip")(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        out = model(pixel_values=pixel_values, **tokenizer(captions, padding=True, return_tensors="pt"))
        expected = out.logits_per_image / model.logit_scale.exp()
    clip = load_clip("mini-clip", trained / "clip")
    similarity = clip.encode_images(images) @ clip.class_features(list(FIGURES)).T
    assert torch.allclose(similarity, expected, atol=1e-5)


def test_answers_equal_a_plain_transformers_loop(trained, figures_root):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(trained / "vlm").eval()
    processor = AutoProcessor.from_pretrained(trained / "vlm")
    special_tokens = processor.tokenizer.all_special_ids  # after a few steps of training the answers would be empty
    model.generation_config.suppress_tokens = special_tokens
    prompt = f"USER: <image>\n{QUESTION}\nASSISTANT:"
    expected = []
    for image in first_images(figures_root):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected.append(processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    vlm = load_vlm("mini-llava", trained / "vlm")
    vlm.model.generation_config.suppress_tokens = special_tokens
    images = first_images(figures_root)
    assert vlm.generate(vlm.prepare(images, [vlm.prompt(QUESTION)] * len(images)), 12) == expected
    assert all(expected)  # twelve tokens each


def test_training_inputs_equal_inference_inputs(trained, figures_root):
    """The cached features and the expanded image tokens equal those of the model and the processor."""
    from vlmclassifier.mini import llava

    vlm = load_vlm("mini-llava", trained / "vlm")
    images = first_images(figures_root, 3)
    processor = vlm.processor.image_processor
    pixels = np.stack([np.asarray(image) for image in images])
    training_images = TrainingImages(pixels, [0, 1, 2], processor.image_mean, processor.image_std)
    features = llava.view_features(vlm.model, training_images, 1, 0)  # [1, images, patches, width]
    text = Text(vlm.prompt(QUESTION), "circle", "b")
    texts = llava.EncodedTexts([text], {"a": 0, "b": 1}, vlm.processor.tokenizer, features)
    inputs = vlm.process([images[1]], [text.prompt])
    ids, prompt_length = texts.rows[0]
    assert ids[:prompt_length] == inputs["input_ids"][0].tolist()
    with torch.inference_mode():
        inference = vlm.model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        training = vlm.model.model.multi_modal_projector(texts.image_features([0]))[0]
    assert torch.allclose(inference, training, atol=1e-5)


def test_a_mini_blip2_is_trained_on_what_it_is_asked(trained, figures_root):
    """Tokens of its prompts in training = of BLIP-2's own processor; its vision encoder comes near CLIP's features."""
    from vlmclassifier.mini import blip2, llava

    pretrain(figures_root, trained, stages=("blip",))
    losses = json.loads((trained / "blip" / "training.json").read_text())["losses"]
    assert losses["vision"][-1] < losses["vision"][0] and len(losses["instruct"]) == 20
    vlm = load_vlm("mini-blip2", trained / "blip")
    images = first_images(figures_root, 2)
    pixels = np.stack([np.asarray(image.resize((48, 48))) for image in images])
    processor = image_processor(48)
    training_images = TrainingImages(pixels, [0, 1], processor.image_mean, processor.image_std)
    features = blip2.image_features(vlm.model, training_images)  # [1, images, 1 + patches, width]
    prompt = load_vlm("mini-llava", trained / "vlm").prompt(QUESTION)
    texts = blip2.without_image_token([Text(prompt, "circle", "b")])
    tokenizer = load_vlm("mini-llava", trained / "vlm").processor.tokenizer
    queries = vlm.model.config.num_query_tokens
    encoded = llava.EncodedTexts(texts, {"a": 0, "b": 1}, tokenizer, features, queries)
    inputs = vlm.process([images[1]], [vlm.prompt(QUESTION)])
    ids, prompt_length = encoded.rows[0]
    assert ids[:prompt_length] == inputs["input_ids"][0].tolist() and ids.count(tokenizer.image_token_id) == queries
    with torch.inference_mode():
        inference = vlm.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        training = blip2.trainable(vlm.model).project(encoded.image_features([0]))[0]
    assert torch.allclose(inference, training, atol=1e-5)
    assert isinstance(vlm.ask(images[0], QUESTION), str)


def test_a_finished_stage_is_kept_and_another_configuration_is_refused(trained, figures_root):
    before = {file: file.stat().st_mtime_ns for file in trained.glob("*/*.safetensors")}
    pretrain(figures_root, trained)
    assert {file: file.stat().st_mtime_ns for file in trained.glob("*/*.safetensors")} == before
    with pytest.raises(UserError, match=r"clip was trained with another configuration \(recipe\)"):
        pretrain(figures_root, trained, clip_steps=7)
    with pytest.raises(UserError, match="lm does not exist: add lm to --stages"):
        pretrain(figures_root, trained / "new", stages=("clip", "vlm"))


def test_other_frequencies_have_a_vlm_folder_of_their_own(trained, figures_root):
    pretrain(figures_root, trained, stages=("vlm",), frequency="uniform")
    shares = json.loads((trained / "vlm-uniform-texts" / "naming.json").read_text())
    assert {row["named"] for row in shares.values()} == {3}
    zipf = json.loads((trained / "vlm-texts" / "naming.json").read_text())
    assert all(row["named"] == round(3 * row["share"]) for row in zipf.values())
    assert (trained / "vlm-uniform" / "model.safetensors").exists() and (trained / "curves.png").stat().st_size > 10_000
    items = json.loads((trained / "vlm-texts" / "instruct.json").read_text())
    steps, batch = 20, RECIPES["smoke"].vlm.batch
    assert len(items) == steps * batch and sum("image" not in item for item in items) == round(0.2 * steps * batch)


def test_the_same_seed_gives_the_same_weights(trained, figures_root, tmp_path):
    """Stage by stage in one process, or in parallel in two."""
    for stage in ("clip", "lm", "vlm"):
        pretrain(figures_root, tmp_path, stages=(stage,))
    for stage in ("clip", "lm", "vlm"):
        assert fingerprint(tmp_path / stage) == fingerprint(trained / stage), stage
        file = f"{stage}/model.safetensors"
        assert (tmp_path / file).read_bytes() == (trained / file).read_bytes(), stage


def forked_processes(parent: int) -> list[psutil.Process]:
    """The server that workers are forked from and the workers; other children, such as git, may end meanwhile."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie
            if "forkserver" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_killed_training_leaves_no_process_behind(figures_root, tmp_path):
    """Its two workers and the server that they are forked from end with it."""
    words = ["training_analysis/pretrain_mini.py", "--data-root", figures_root, "--out", tmp_path, "--clip-steps", 5000]
    training = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL)
    workers: list[psutil.Process] = []
    try:
        while training.poll() is None and len(workers) < 3:
            workers = forked_processes(training.pid)
            time.sleep(0.05)
    finally:
        training.kill()
    assert training.wait() != 0 and len(workers) == 3
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 3 and not alive


def test_a_vlm_that_answers_with_generic_words_causes_a_warning(trained, figures_root, capsys):
    """After a few training steps, no reply contains a class name."""
    pretrain(figures_root, trained, stages=("vlm",), frequency="permuted")
    assert "of the VLM's replies to train images name a class" in capsys.readouterr().err


@pytest.mark.slow
def test_real_images_end_to_end(realdata, tmp_path, capsys):
    """The photos preset on the 180 training images of one benchmark, with the steps of a few seconds."""
    arguments = {"benchmark": "caltech", "preset": "photos", "clip_steps": None, "vlm_steps": None}
    pretrain(realdata, tmp_path, minutes=0.15, tokenizer="bpe", evaluate=True, **arguments)
    shown = capsys.readouterr().out
    for row in ("CLIP, zero-shot", "VLM, open world", "linear probe on 16x16 pixels"):
        assert row in shown
    assert "n=120" in shown and "micro" in shown and "macro" in shown
    curve = json.loads((tmp_path / "clip" / "training.json").read_text())["validation"]
    assert curve and curve[-1][0] == json.loads((tmp_path / "fitted.json").read_text())["steps"]["clip"]
    pretrain(realdata, tmp_path, minutes=0.15, tokenizer="bpe", **arguments)  # reads the fitted steps


def test_the_word_vocabulary_covers_every_text():
    tokenizer = word_tokenizer(vocabulary_texts(CORPUS))
    example = Example("x", "", "limaçon of Pascal", 0, "train")
    texts = [language_text(number, CORPUS, 3) for number in range(2000)]
    texts += [image_text(example, CORPUS, named, 3, epoch) for named in (True, False) for epoch in range(60)]
    assert not any(tokenizer.unk_token_id in ids for ids, _ in encode(texts, tokenizer))
    for name in CORPUS.names:
        assert tokenizer.decode(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == name
    assert len(tokenizer('"a, b"', add_special_tokens=False)["input_ids"]) == 5


@pytest.mark.parametrize("key", BENCHMARKS)
def test_word_tokens_decode_to_every_class_name(key):
    names = class_names(BENCHMARKS[key])
    tokenizer = word_tokenizer([*names, '"'])
    for name in names:
        ids = tokenizer(f' "{name}, {name}".', add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in tokenizer(name)["input_ids"] and len(ids) >= 3
        assert tokenizer.decode(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == name


def test_subword_tokens_split_names_and_decode_to_them():
    tokenizer = bpe_tokenizer()
    assert 3000 < len(tokenizer) <= 4096
    counts = [len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) for name in CORPUS.names]
    words = [len(name.split()) for name in CORPUS.names]
    assert sum(counts) > 1.8 * sum(words) and sum(count > 1 for count in counts) > 80
    for name in CORPUS.names:
        assert tokenizer.decode(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]).strip() == name
    prompt, answer = "USER: <image>\nWhy?\nASSISTANT:", "Sierpiński carpet"
    (ids, prompt_length), = encode([Text(prompt, answer)], tokenizer)  # fmt: skip
    assert ids == tokenizer(f"{prompt} {answer}")["input_ids"] + [tokenizer.eos_token_id]
    assert ids[:prompt_length] == tokenizer(prompt)["input_ids"]


def test_labels_cover_only_the_answer_and_the_end_token():
    input_ids, labels = collate([([1, 5, 6, 7, 2], 3), ([1, 8, 2], 1)], pad=0)
    assert input_ids.tolist() == [[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 7, 2], [-100, 8, 2, -100, -100]]


def test_batches_use_all_rows_equally_often():
    lengths = [1 + number % 40 for number in range(640)]
    batches = length_batches(lengths, 64, 20, seed=0)
    rows = sorted(row for batch in batches for row in batch)
    assert rows == sorted([*range(640), *range(640)]) and batches == length_batches(lengths, 64, 20, seed=0)
    padded_tokens = sum(max(lengths[row] for row in batch) * 64 for batch in batches)
    assert padded_tokens < 1.3 * 2 * sum(lengths)


def test_the_contrastive_loss_equals_its_formula():
    torch.manual_seed(0)
    similarity, classes = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    to_image = -torch.stack(
        [F.log_softmax(similarity[:, k], 0)[classes == k].mean() for k in range(3)]
    ).mean()  # fmt: skip
    expected = 0.7 * F.cross_entropy(similarity, classes) + 0.3 * to_image
    assert torch.isclose(contrastive_loss(similarity, F.one_hot(classes).float(), 0.3), expected)


def test_gradients_in_parts_equal_those_of_the_whole_batch():
    torch.manual_seed(0)
    model, rows = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)), torch.randn(7, 5)
    model(rows).sum().div(7).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    optimisation = Optimisation([model], 1e-2, 1e-2)
    loss = optimisation.backward_batch(lambda part: model(rows[list(part)]).sum(), range(7), [1] * 7)
    assert loss == pytest.approx(model(rows).mean().item(), abs=1e-6)
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, grads, strict=True))
    assert len(optimisation.optimisers) == 3  # two halves of the matrices, and the biases


def test_the_learning_rate_warms_up_and_decays():
    rates = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 30) and rates[29:300] == [1.0] * 271 and rates[-1] < 0.002


def random_images(labels) -> TrainingImages:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    return TrainingImages(pixels, labels, [0.5] * 3, [0.25] * 3)


def test_held_out_images_are_never_trained_on():
    images = random_images([0] * 20 + [1] * 10 + [2] * 2)
    train, held_out = images.split(0.1, seed=0)
    assert not set(train.tolist()) & set(held_out.tolist()) and len(train) + len(held_out) == 32
    assert torch.bincount(images.labels[held_out], minlength=3).tolist() == [2, 1, 0]
    assert len(images.split(0.0, seed=0)[1]) == 0
    assert set(images.training_order(train, 500, balanced=True, seed=0).tolist()) <= set(train.tolist())
    share = (images.labels[images.training_order(train, 6000, balanced=True, seed=0)] == 0).float().mean().item()
    assert share == pytest.approx(18**0.5 / (18**0.5 + 9**0.5 + 2**0.5), abs=0.03)


def test_augmentation_is_reproducible_and_mixed_targets_sum_to_one():
    values, targets = random_images(list(range(6))).pixel_values(slice(0, 6)), torch.eye(6)
    first, again = (augment(values, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == values.shape
    assert not torch.equal(first, augment(values, torch.Generator().manual_seed(4)))
    mixed, mixed_targets = mix(values, targets, torch.Generator().manual_seed(3), share=1.0)
    assert torch.allclose(mixed_targets.sum(1), torch.ones(6)) and (mixed_targets > 0).sum(1).max() == 2
    same, same_targets = mix(values, targets, torch.Generator().manual_seed(3), share=0.0)
    assert torch.equal(same, values) and torch.equal(same_targets, targets)
    assert not torch.equal(mixed, values)


def test_every_view_and_every_seed_gives_other_features(trained, figures_root):
    from vlmclassifier.mini import llava

    model, images = load_vlm("mini-llava", trained / "vlm").model, random_images([0, 1, 2])
    images.pixels = F.interpolate(images.pixels, size=48)
    views = llava.view_features(model, images, 3, seed=0)  # [3, images, patches, width]
    assert not torch.equal(views[1], views[2]) and not torch.equal(views[0], views[1])
    assert torch.equal(views, llava.view_features(model, images, 3, seed=0))
    other = llava.view_features(model, images, 3, seed=1)
    assert torch.equal(views[0], other[0]) and not torch.equal(views[1], other[1])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"frequency": "zipff"}, "neither zipf, permuted, uniform nor a table"),
        ({"naming_head": -1.0}, "--naming-head -1 is outside 0 to 1"),
        ({"keep_generic": 1.5}, "--keep-generic 1.5 is outside"),
        ({"minutes": 0.0, "clip_steps": None, "vlm_steps": None}, "--minutes 0 is outside"),
        ({"minutes": 1.0}, "leave out --clip-steps"),
        ({"seed": -1}, "--seed -1 is negative"),
        ({"naming_head": 0.0, "keep_generic": 0.0}, "no image is named or gets a generic text"),
        ({"preset": "photos", "benchmark": "imagenet"}, "imagenet.jsonl"),
    ],
)
def test_mistakes_are_reported_before_the_training(wrong, message, figures_root, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrain(figures_root, tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_minutes_decide_before_the_first_stage(trained, figures_root):
    with pytest.raises(UserError, match="is trained already: leave out --minutes or choose another --out"):
        fit_steps(smoke_training(figures_root, trained), 1.0)


def smoke_training(figures_root, out):
    module = script("training_analysis/pretrain_mini.py")
    return module.build_training(module.Args(data_root=figures_root, preset="smoke", out=out))


def test_texts_and_their_counts_agree(trained, figures_root):
    """naming.json counts the names in the written texts; a class that is never named is in none of them."""
    rows = json.loads((trained / "vlm-texts" / "naming.json").read_text())
    label_of = {example.id: example.label for example in smoke_training(figures_root, trained).examples}
    for stage in ("pretrain", "instruct"):
        counts = dict.fromkeys(rows, 0)
        for item in json.loads((trained / "vlm-texts" / f"{stage}.json").read_text()):
            if "image" in item:
                label = label_of[item["image"]]
                counts[label] += label in "".join(turn["value"] for turn in item["conversations"])
        assert counts == {name: row[f"texts_{stage}"] for name, row in rows.items()}
        assert all(counts[name] == 0 for name, row in rows.items() if row["named"] == 0) and sum(counts.values()) > 50


def test_first_images_per_class_keeps_the_manifests_order():
    rows = [Example(f"{label}{i}", "", label, 0, "train") for i in range(3) for label in "ab"]
    assert [row.id for row in first_images_per_class(rows, 2)] == ["a0", "b0", "a1", "b1"]


def test_muon_in_float32_equals_torchs_muon():
    """The updates equal torch's to the precision of bfloat16; a matrix without a gradient does not change."""
    from vlmclassifier.mini.optimisation import Muon

    torch.manual_seed(0)
    shapes = [(64, 128), (128, 64), (64, 128), (32, 32)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(matrix.detach().clone()) for matrix in ours]
    start = [matrix.detach().clone() for matrix in ours]
    muon = Muon(ours, 1e-2)
    reference = torch.optim.Muon(theirs, 1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for our, their in zip(ours[:-1], theirs[:-1], strict=True):
            our.grad = torch.randn(our.shape)
            their.grad = our.grad.clone()
        muon.step()
        reference.step()
    for our, their, before in zip(ours[:-1], theirs[:-1], start[:-1], strict=True):
        assert (our - their).norm() < 0.02 * (their - before).norm()
    assert torch.equal(ours[-1], start[-1])


def test_training_images_are_resized_like_the_processors(realdata, tmp_path):
    """Training resizes with Pillow, inference with torchvision: the results differ by at most one grey level."""
    benchmark = BENCHMARKS["caltech"]
    examples = load_examples(benchmark, class_names(benchmark), realdata, "train")[:8]
    processor = image_processor(48)
    images = [open_image(example.image) for example in examples]
    inference = processor(images, return_tensors="pt")["pixel_values"]
    pixels = load_pixels(examples, realdata, 48, tmp_path)
    training = TrainingImages(pixels, [0] * 8, processor.image_mean, processor.image_std).pixel_values(slice(None))
    levels = ((training - inference) * torch.tensor(processor.image_std)[:, None, None] * 255).abs()
    assert levels.max() < 1.01 and levels.mean() < 0.02
