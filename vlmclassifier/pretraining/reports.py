"""What came out of a training: curves as a picture, and a first comparison on the test split."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmclassifier.benchmarks import check_files, evaluation_order, find_benchmark, load_examples
from vlmclassifier.images import open_image
from vlmclassifier.pretraining.stages import RECORD, Training, first_of_each_class
from vlmclassifier.records import Example

PROBE_SIDE = 16  # pixels
BATCH = 64


def draw_curves(out: Path) -> Path:
    """Draw the losses of every stage below `out` into OUT/curves.png; return its path."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    curves = {}
    for file in sorted(out.glob(f"*/{RECORD}")):
        losses = json.loads(file.read_text(encoding="utf-8"))["losses"]
        parts = losses if isinstance(losses, dict) else {"": losses}
        curves |= {" ".join([file.parent.name, part]).strip(): values for part, values in parts.items()}
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (title, values) in zip(axes.flat, curves.items(), strict=False):
        window = max(1, len(values) // 50)
        smooth = [
            sum(values[max(0, i - window) : i + 1]) / len(values[max(0, i - window) : i + 1])
            for i in range(len(values))
        ]
        axis.plot(values, color="0.8", linewidth=0.8)
        axis.plot(smooth, color="tab:blue", linewidth=1.5)
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    figure.tight_layout()
    unfinished = out / f"curves-{os.getpid()}.png"  # trainings side by side draw the same picture
    figure.savefig(unfinished, dpi=120)
    unfinished.replace(out / "curves.png")
    plt.close(figure)
    return out / "curves.png"


def test_examples(training: Training, benchmark: str, classes: Path | None) -> list[Example]:
    """The test split in the evaluation order. Raises UserError where the manifest has none or pictures are missing."""
    task = find_benchmark(benchmark, classes)
    examples = load_examples(task, training.world.names, training.root, task.test_split)
    check_files(examples)
    return evaluation_order(examples)


def accuracies(training: Training, benchmark: str, classes: Path | None, limit: int = 2000) -> str:
    """A table of micro and macro accuracy on the test split: CLIP, the VLM in the open world, a probe on tiny pictures.

    The test split is read here for the first time; nothing is chosen by it.
    """
    from tabulate import tabulate

    from vlmclassifier.clip import load_clip
    from vlmclassifier.prompts import WORDINGS
    from vlmclassifier.vlm import load_vlm

    examples = test_examples(training, benchmark, classes)[:limit]
    clip, vlm = load_clip("mini-clip", training.folder("clip")), load_vlm("mini-llava", training.folder("vlm"))
    class_features, prompt = clip.class_features(training.world.names), vlm.prompt(WORDINGS["base"])
    hits: dict[str, list[bool]] = {"CLIP, zero-shot": [], "VLM, open world": []}
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        part = [open_image(example.image, training.root, example.row) for example in batch]
        best = [training.world.names[ranking[0]] for ranking in clip.classify(part, class_features)]
        hits["CLIP, zero-shot"] += [name == e.label for name, e in zip(best, batch, strict=True)]
        answers = vlm.generate(vlm.prepare(part, [prompt] * len(part)), max_new_tokens=32)
        hits["VLM, open world"] += [e.label.lower() in answer.lower() for answer, e in zip(answers, batch, strict=True)]
    hits[f"linear probe on {PROBE_SIDE}x{PROBE_SIDE} pixels"] = pixel_probe(training, examples)
    labels = [example.label for example in examples]
    rows = [(name, 100 * sum(right) / len(right), 100 * _macro(right, labels)) for name, right in hits.items()]
    return tabulate(rows, [f"accuracy in percent, n={len(labels)}", "micro", "macro"], "pipe", floatfmt=".1f")


def _macro(hits: Sequence[bool], labels: Sequence[str]) -> float:
    of_class: dict[str, list[bool]] = {}
    for hit, label in zip(hits, labels, strict=True):
        of_class.setdefault(label, []).append(hit)
    return sum(sum(found) / len(found) for found in of_class.values()) / len(of_class)


def pixel_probe(training: Training, examples: Sequence[Example]) -> list[bool]:
    """Hits of logistic regression on 16 x 16 pixels, trained on at most 60 pictures per class of train: the floor."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = first_of_each_class(training.examples, 60)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200))
    probe.fit([_pixels(training, example) for example in train], [example.label for example in train])
    found = probe.predict([_pixels(training, example) for example in examples])
    return [bool(name == example.label) for name, example in zip(found, examples, strict=True)]


def _pixels(training: Training, example: Example) -> np.ndarray:
    image = open_image(example.image, training.root, example.row)
    return np.asarray(image.resize((PROBE_SIDE, PROBE_SIDE)), dtype=np.float32).ravel() / 255
