"""Protects: a number of a model that is not finite ends the run with the image's id, and no wrong row is recorded."""

import shutil

import pytest
import torch
from conftest import noise, script
from safetensors.torch import load_file, save_file

from vlmclassifier import load_clip, load_vlm
from vlmclassifier.clip import CLIP
from vlmclassifier.finite import NotFiniteError
from vlmclassifier.ranking import Ranker
from vlmclassifier.records import UserError
from vlmclassifier.scoring.guidance import Scoring
from vlmclassifier.vlm import VLM

RUNS = {  # script, model, options
    "classify_vlm": ("main_results/classify_vlm.py", "llava-1.5-7b", {}),
    "classify_vlm, features shared": ("main_results/classify_vlm.py", "blip2-2.7b", {"candidates": ("none", "2")}),
    "classify_clip": ("main_results/classify_clip.py", "clip-vit-l-336", {}),
    "rank_labels": ("inference_analysis/rank_labels.py", "llava-1.5-7b", {}),
    "rank_labels --top-k": ("inference_analysis/rank_labels.py", "llava-1.5-7b", {"top_k": 2}),
}


def damaged(checkpoint, folder):
    """A copy of a checkpoint with a row of NaN in its matrices, as an interrupted conversion may leave it."""
    shutil.copytree(checkpoint, folder)
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    for tensor in weights.values():
        if tensor.ndim == 2:
            tensor[0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_a_damaged_checkpoint_ends_without_a_row(name, tiny, own, tmp_path):
    path, model, options = RUNS[name]
    module = script(path)
    weights = damaged(tiny / model, tmp_path / "damaged")
    with pytest.raises(UserError, match=r"(of .*\d\.png .*)?is not a finite number in float32"):
        module.main(module.Args(model, weights, out=tmp_path / "run", **own.args, **options))
    assert not [row for file in tmp_path.glob("run*/*.jsonl") for row in file.read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_image_is_named_and_rows_before_it_are_kept(name, tiny, own, tmp_path, monkeypatch):
    """One image of three overflows; it is the second row of a batch of two, or of a batch that was split."""
    path, model, options = RUNS[name]
    module, dark = script(path), (0, 10, 10)  # the first image of `own`

    def overflow(images, pixel_values):
        for row, image in enumerate(images):
            image = image[0] if isinstance(image, list) else image
            if image.getpixel((0, 0)) == dark:
                pixel_values[row] = torch.inf

    prepare, process = CLIP.prepare, VLM.process

    def prepare_clip(clip, images):
        values = prepare(clip, images)
        overflow(images, values)
        return values

    def process_vlm(vlm, images, prompts):
        inputs = process(vlm, images, prompts)
        overflow(images, inputs["pixel_values"])
        return inputs

    monkeypatch.setattr(CLIP, "prepare", prepare_clip)
    monkeypatch.setattr(VLM, "process", process_vlm)
    with pytest.raises(
        UserError,
        match=r"of .*/0\.png \(.*mine.jsonl row 1\) is not a finite number in float32: nothing of this batch is",
    ):
        module.main(module.Args(model, tiny / model, out=tmp_path / "run", batch_size=1, **own.args, **options))
    recorded = [row for file in tmp_path.glob("run*/*.jsonl") for row in file.read_text().splitlines()]
    assert recorded and not any('"0.png"' in row for row in recorded)


def test_a_split_batch_names_the_row_of_the_whole_batch(tiny):
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b")
    vlm._splitter.size = 2
    batch = vlm.prepare([noise((40, 40), number) for number in range(5)], [vlm.prompt("What is it?")] * 5)
    process = vlm.process

    def with_an_infinite_image(images, prompts):
        inputs = process(images, prompts)
        inputs["pixel_values"][[image is batch.images[3] for image in images]] = torch.inf
        return inputs

    vlm.process = with_an_infinite_image
    with pytest.raises(NotFiniteError) as raised:
        vlm.generate(batch, 3)
    assert raised.value.row == 3 and "--dtype float32" in str(raised.value)


def test_float16_that_overflows_is_advised_to_use_another_dtype(tiny, tmp_path):
    """Weights that float32 and bfloat16 hold: the ranking of such a model in float16 reported 100%."""
    clip = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336", dtype="float16")
    with torch.no_grad():
        clip.model.visual.proj.mul_(1e6)
    with pytest.raises(NotFiniteError, match=r"in float16: nothing .* use --dtype bfloat16 or float32"):
        clip.encode_images([noise((40, 40))])
    vlm = load_vlm("llava-1.5-7b", tiny / "llava-1.5-7b", dtype="float16")
    with torch.no_grad():
        vlm.model.lm_head.weight.mul_(1e6)
    for work in (
        lambda: vlm.ask(noise((40, 40)), "What?"),
        lambda: Ranker(vlm, ("cat", "dog"), "What?").log_probs([noise((40, 40))]),
        lambda: Ranker(vlm, ("cat", "dog"), "What?").top_k([noise((40, 40))], 1, Scoring()),
        lambda: Ranker(vlm, ("cat", "dog"), "What?").prior(),
        lambda: Ranker(vlm, ("cat", "dog"), "What?").select_method(noise((40, 40))),
    ):
        with pytest.raises(NotFiniteError, match="in float16"):
            work()


def test_a_feature_without_a_direction_is_refused(tiny):
    """An image whose features are all 0 is equally near to every class: the first would win."""
    clip = load_clip("clip-vit-l-336", tiny / "clip-vit-l-336")
    with torch.no_grad():
        clip.model.visual.proj.zero_()
    with pytest.raises(NotFiniteError, match="An image feature"):
        clip.encode_images([noise((40, 40))])


def test_a_training_that_diverges_saves_nothing(figures_root, tmp_path, monkeypatch):
    from vlmclassifier.mini import language

    monkeypatch.setattr(language, "next_token_loss", lambda *arguments: torch.tensor(torch.nan, requires_grad=True))
    module = script("training_analysis/pretrain_mini.py")
    args = module.Args(data_root=figures_root, preset="smoke", stages=("lm",), out=tmp_path, evaluate=False)
    with pytest.raises(UserError, match="the loss of step 0 is not a finite number"):
        module.main(args)
    assert not (tmp_path / "lm").exists()
