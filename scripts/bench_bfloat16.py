"""Measure how many answers change between float32 and bfloat16, and with the batch size in bfloat16.

    python scripts/bench_bfloat16.py
    python scripts/bench_bfloat16.py --models llava-1.5-7b --device cuda --pictures 200

Asks random-weight miniatures, or with --weights one checkpoint of yours. The last line is one JSON object:
changed: share of the answers in bfloat16 that differ from those in float32, by model.
changed_by_batch: share of the answers in bfloat16 that differ between single pictures and batches of 8.
A miniature's next tokens are nearly equally likely, so that rounding decides far more often than in a trained model.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.models import MODELS
from vlmclassifier.records import UserError


@dataclass
class Args:
    models: tuple[str, ...] = ()
    """Keys of vlmclassifier/models.py; without it every model with a miniature, except the 13B ones."""
    weights: Path | None = None
    """A checkpoint folder of the one model in --models, in place of its miniature."""
    data_root: Path | None = None
    """Folder of photographs (*.jpg, *.jpeg, *.png, at any depth); without it generated pictures of several sizes."""
    pictures: int = 40
    """Pictures per model."""
    max_new_tokens: int = 64
    """Longest answer."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Seed of the generated pictures, of the choice among photographs, and of the random weights."""


def main(args: Args) -> None:
    """Ask every model three times about the same pictures."""
    cli.check_positive(pictures=args.pictures, max_new_tokens=args.max_new_tokens)
    for key in args.models:
        if key not in MODELS or MODELS[key].kind != "vlm" or MODELS[key].source is None:
            raise UserError(f"--models {key} is no vision-language model of vlmclassifier/models.py: choose another.")
    if args.weights is not None and len(args.models) != 1:
        raise UserError("--weights belongs to one model: name just that one with --models.")
    from tqdm import tqdm

    from vlmclassifier.tiny import make_tiny

    known = [key for key, spec in MODELS.items() if spec.kind == "vlm" and spec.source and "13b" not in key]
    images = load_pictures(args)
    changed, changed_by_batch = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for key in tqdm(args.models or known, unit="model"):
            weights = args.weights or make_tiny(MODELS[key], Path(folder) / key, args.seed)
            exact = answers(key, weights, images, "float32", 8, args)
            single, batched = (answers(key, weights, images, "bfloat16", size, args) for size in (1, 8))
            changed[key], changed_by_batch[key] = share(exact, batched), share(single, batched)
            print(f"{key}: {changed[key]:.3f} changed from float32, {changed_by_batch[key]:.3f} by the batch size")
    print(json.dumps({"changed": changed, "changed_by_batch": changed_by_batch, "n": len(images)}))


def load_pictures(args: Args) -> list:
    """The pictures that every model is asked about."""
    from make_pictures import draw

    from vlmclassifier.images import open_image

    if args.data_root is None:
        return [draw(random.Random(f"{args.seed}:{number}")) for number in range(args.pictures)]
    kinds = {".jpg", ".jpeg", ".png"}
    files = sorted(file for file in args.data_root.rglob("*") if file.suffix.lower() in kinds)
    if not files:
        raise UserError(f"--data-root {args.data_root} holds no picture: choose another folder.")
    chosen = random.Random(args.seed).sample(files, min(args.pictures, len(files)))
    return [open_image(file, args.data_root) for file in chosen]


def answers(key: str, weights: Path, images: list, dtype: str, size: int, args: Args) -> list[str]:
    """The answers to the base question."""
    from vlmclassifier.prompts import WORDINGS
    from vlmclassifier.vlm import load_vlm

    vlm = load_vlm(key, weights, args.device, dtype)
    prompt, found = vlm.prompt(WORDINGS["base"]), []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        found += vlm.generate(vlm.prepare(chunk, [prompt] * len(chunk)), args.max_new_tokens)
    return found


def share(one: list[str], other: list[str]) -> float:
    """Share of the answers that differ."""
    return round(sum(a != b for a, b in zip(one, other, strict=True)) / len(one), 4)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
