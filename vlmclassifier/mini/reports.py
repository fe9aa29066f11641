"""Reports on a finished training: the loss curves as an image, and a first comparison on the test split."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmclassifier.benchmarks import check_files, evaluation_order, find_benchmark, load_examples
from vlmclassifier.images import open_image
from vlmclassifier.mini.stages import RECORD_FILE, Training, first_images_per_class
from vlmclassifier.records import Example

PROBE_SIDE = 16  # pixels
PROBE_IMAGES = 60  # per class
BATCH = 64  # images


def draw_curves(out: Path) -> Path:
    """Draw the losses of every stage below the folder `out` into OUT/curves.png and return its path."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    curves = _read_losses(out)
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False)
    for unused_axis in axes.flat[len(curves) :]:
        unused_axis.axis("off")
    for axis, (title, losses) in zip(axes.flat, curves.items(), strict=False):
        axis.plot(losses, color="0.8", linewidth=0.8)
        axis.plot(_running_mean(losses), color="tab:blue", linewidth=1.5)
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    figure.tight_layout()
    unfinished = out / f"curves-{os.getpid()}.png"  # trainings in parallel write the same file
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(out / "curves.png")
    plt.close(figure)
    return out / "curves.png"


def _read_losses(out: Path) -> dict[str, list[float]]:
    """Return title -> losses of every checkpoint below `out`; the VLM has one curve for each of its two stages."""
    curves = {}
    for file in sorted(out.glob(f"*/{RECORD_FILE}")):
        losses = json.loads(file.read_text(encoding="utf-8"))["losses"]
        if isinstance(losses, dict):
            for stage, stage_losses in losses.items():
                curves[f"{file.parent.name} {stage}"] = stage_losses
        else:
            curves[file.parent.name] = losses
    return curves


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and those before it, over about 2% of all values."""
    window = max(1, len(values) // 50)
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - 1 - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def test_examples(training: Training, benchmark: str, classes: Path | None) -> list[Example]:
    """Return the test split in evaluation order.

    Raises UserError when the manifest has no test split or images are missing.
    """
    task = find_benchmark(benchmark, classes)
    examples = load_examples(task, training.corpus.names, training.root, task.test_split)
    check_files(examples)
    return evaluation_order(examples)


def accuracy_table(training: Training, benchmark: str, classes: Path | None, limit: int = 2000) -> str:
    """Return a table of micro and macro accuracy on the test split: CLIP, the VLM in the open world, a pixel baseline.

    This is the first use of the test split; nothing is chosen by it. `limit`: at most this many images.
    """
    from tabulate import tabulate

    from vlmclassifier.clip import load_clip
    from vlmclassifier.prompts import WORDINGS
    from vlmclassifier.vlm import load_vlm

    examples = test_examples(training, benchmark, classes)[:limit]
    names = training.corpus.names
    clip, vlm = load_clip("mini-clip", training.folder("clip")), load_vlm("mini-llava", training.folder("vlm"))
    class_features, prompt = clip.class_features(names), vlm.prompt(WORDINGS["base"])
    clip_hits, vlm_hits = [], []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        images = [open_image(example.image, training.root, example.row) for example in batch]
        rankings = clip.classify(images, class_features)
        answers = vlm.generate(vlm.prepare(images, [prompt] * len(images)), max_new_tokens=32)
        for example, ranking, answer in zip(batch, rankings, answers, strict=True):
            clip_hits.append(names[ranking[0]] == example.label)
            vlm_hits.append(example.label.lower() in answer.lower())
    hits_of_model = {
        "CLIP, zero-shot": clip_hits,
        "VLM, open world": vlm_hits,
        f"linear probe on {PROBE_SIDE}x{PROBE_SIDE} pixels": pixel_probe(training, examples),
    }
    labels = [example.label for example in examples]
    rows = []
    for model, hits in hits_of_model.items():
        rows.append((model, 100 * sum(hits) / len(hits), 100 * _macro_accuracy(hits, labels)))
    return tabulate(rows, [f"accuracy in percent, n={len(labels)}", "micro", "macro"], "pipe", floatfmt=".1f")


def _macro_accuracy(hits: Sequence[bool], labels: Sequence[str]) -> float:
    """Return the mean over the classes of the accuracy (0 to 1) on a class's images."""
    hits_of_class: dict[str, list[bool]] = {}
    for hit, label in zip(hits, labels, strict=True):
        hits_of_class.setdefault(label, []).append(hit)
    accuracies = [sum(class_hits) / len(class_hits) for class_hits in hits_of_class.values()]
    return sum(accuracies) / len(accuracies)


def pixel_probe(training: Training, examples: Sequence[Example]) -> list[bool]:
    """Return the hits of logistic regression on 16 x 16 pixels: the baseline that needs no vision encoder.

    It is trained on at most 60 images per class of the train split.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = first_images_per_class(training.examples, PROBE_IMAGES)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200))
    probe.fit([_small_pixels(training, example) for example in train], [example.label for example in train])
    predictions = probe.predict([_small_pixels(training, example) for example in examples])
    return [bool(name == example.label) for name, example in zip(predictions, examples, strict=True)]


def _small_pixels(training: Training, example: Example) -> np.ndarray:
    """Return the pixels of an image resized to 16 x 16: [768], values 0 to 1."""
    image = open_image(example.image, training.root, example.row)
    return np.asarray(image.resize((PROBE_SIDE, PROBE_SIDE)), dtype=np.float32).ravel() / 255
