"""Benchmark classification against baselines in one process, as ratios that are comparable between machines.

    python scripts/bench/bench_classify.py
    python scripts/bench/bench_classify.py --repeats 9 --device cuda

Prints three ratios, medians over the repeats, as one JSON object on the last line:
batched_vs_single: answers per second of a VLM with batches of 8 images and 64 new tokens, over one image at a time.
clip_class_features_once_vs_per_batch: time of a CLIP batch of 32 images if the features of 1,000 classes are computed
for every batch (as in the paper's code), over the time if they are computed once per run.
resume_overhead: share of the time of a run that is spent on recording rows, with batches of 100 ms.
"""

import json
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.generated_images import generated_image


@dataclass
class Args:
    repeats: int = 5
    """Measurements of each ratio; the median is printed."""
    images: int = 32
    """Images per measurement of the VLM and of CLIP."""
    batches: int = 100
    """Batches of 100 ms per measurement of the overhead of recording."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Seed of the generated images and of the random weights of the models."""


def measure_seconds(function) -> float:
    """Wall-clock time of a call in seconds. Work on a GPU is included, because each call returns numbers on the CPU."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def batched_vs_single(vlm, images) -> float:
    """Time with one image at a time over time with batches of 8. There is no end token: every answer has 64 tokens."""
    prompts = [vlm.prompt("What type of object is in this photo?")] * 8
    vlm.model.generation_config.eos_token_id = None

    def generate(batch_size: int) -> None:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            vlm.generate(vlm.prepare(batch, prompts[: len(batch)]), 64)

    return measure_seconds(lambda: generate(1)) / measure_seconds(lambda: generate(8))


def features_once_vs_per_batch(clip, images, names) -> float:
    """Time of a batch including the class features, over the time of a batch with precomputed class features."""
    features = clip.class_features(names)  # [classes, width]
    per_batch = measure_seconds(lambda: clip.classify(images, clip.class_features(names)))
    return per_batch / measure_seconds(lambda: clip.classify(images, features))


def resume_overhead(folder: Path, batches: int) -> float:
    """Share of the time that is spent in open_run, pending, append and finish, if every batch takes 100 ms."""
    from vlmclassifier.images import prefetch
    from vlmclassifier.records import Prediction
    from vlmclassifier.runs import open_run

    def prediction(example_id: str) -> Prediction:
        return Prediction(example_id, "tench", 0, "USER: <image>\nQ?\nASSISTANT:", None, "word " * 40, None)

    batch_seconds = 0.0

    def run_all_batches() -> None:
        nonlocal batch_seconds
        run = open_run(folder, {"model": "bench", "limit": None}, [f"{i}.jpg" for i in range(8 * batches)])
        for ids, _ in prefetch(run.pending(8), list):  # as in the scripts
            batch_seconds += measure_seconds(lambda: time.sleep(0.1))
            run.append([prediction(example_id) for example_id in ids])
        run.finish()

    total_seconds = measure_seconds(run_all_batches)
    return (total_seconds - batch_seconds) / total_seconds


def main(args: Args) -> None:
    """Build the models, measure every ratio several times, print the medians."""
    import torch

    from vlmclassifier.benchmarks import BENCHMARKS, class_names
    from vlmclassifier.clip import load_clip
    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny
    from vlmclassifier.vlm import load_vlm

    images = [generated_image(random.Random(f"{args.seed}:{i}")) for i in range(args.images)]
    names = class_names(BENCHMARKS["imagenet"])
    folder = Path(tempfile.mkdtemp(prefix="bench-classify-"))
    try:
        for key in ("llava-1.5-7b", "clip-vit-l-336"):
            make_tiny(MODELS[key], folder / key, args.seed)
        vlm = load_vlm("llava-1.5-7b", folder / "llava-1.5-7b", args.device)
        clip = load_clip("clip-vit-l-336", folder / "clip-vit-l-336", args.device)
        ratios = {
            "batched_vs_single": lambda repeat: batched_vs_single(vlm, images),
            "clip_class_features_once_vs_per_batch": lambda repeat: features_once_vs_per_batch(clip, images, names),
            "resume_overhead": lambda repeat: resume_overhead(folder / f"run-{repeat}", args.batches),
        }
        medians = {}
        for name, measure in ratios.items():
            measure("warm-up")
            values = [measure(repeat) for repeat in range(args.repeats)]
            medians[name] = round(statistics.median(values), 4)
            print(f"{name}: {', '.join(f'{value:.4f}' for value in values)}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(medians | {"device": str(vlm.model.device), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
