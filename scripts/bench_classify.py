"""Measure the main job against its baselines, in one process: ratios, not seconds, so that machines compare.

    python scripts/bench_classify.py
    python scripts/bench_classify.py --repeats 9 --device cuda

Three ratios, medians over the repeats, as one JSON object on the last line:
batched_vs_single: answers per second of a VLM at batch 8 with 64 new tokens, over one picture at a time.
clip_class_features_once_vs_per_batch: time of one CLIP batch of 32 with the features of 1,000 classes computed again
for it (as the paper's code did), over the same batch with features computed once per run.
resume_overhead: share of a run's time that goes into making its rows safe, at batches of 100 ms.
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


@dataclass
class Args:
    repeats: int = 5
    """Measurements of each ratio; the median is printed."""
    pictures: int = 32
    """Pictures per measurement of the VLM and of CLIP."""
    batches: int = 100
    """Batches of 100 ms in one measurement of the overhead of writing."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Seed of the generated pictures and of the models' random weights."""


def seconds(work) -> float:
    """Wall time of a call; the GPU's work is done because each call ends in numbers on the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def batched_vs_single(vlm, images) -> float:
    """Time one by one over time at batch 8. The end token is taken away, so that every answer has 64 tokens."""
    prompts = [vlm.prompt("What type of object is in this photo?")] * 8
    vlm.model.generation_config.eos_token_id = None

    def run(size: int) -> None:
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            vlm.generate(vlm.prepare(chunk, prompts[: len(chunk)]), 64)

    return seconds(lambda: run(1)) / seconds(lambda: run(8))


def features_once_vs_per_batch(clip, images, names) -> float:
    """Time of a batch with class features computed for it over the time of a batch that is given them."""
    features = clip.class_features(names)
    per_batch = seconds(lambda: clip.classify(images, clip.class_features(names)))
    return per_batch / seconds(lambda: clip.classify(images, features))


def resume_overhead(folder: Path, batches: int) -> float:
    """Time in open_run, pending, append and finish over the whole time, around batches that take 100 ms."""
    from vlmclassifier.images import prefetch
    from vlmclassifier.records import Prediction
    from vlmclassifier.runs import open_run

    def row(example_id: str) -> Prediction:
        return Prediction(example_id, "tench", 0, "USER: <image>\nQ?\nASSISTANT:", None, "word " * 40, None, None)

    worked = 0.0

    def whole() -> None:
        nonlocal worked
        run = open_run(folder, {"model": "bench", "limit": None}, [f"{i}.jpg" for i in range(8 * batches)])
        for ids, _ in prefetch(run.pending(8), list):  # as the scripts do
            worked += seconds(lambda: time.sleep(0.1))
            run.append([row(i) for i in ids])
        run.finish()

    total = seconds(whole)
    return (total - worked) / total


def main(args: Args) -> None:
    import torch
    from make_pictures import draw

    from vlmclassifier.benchmarks import BENCHMARKS, class_names
    from vlmclassifier.clip import load_clip
    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny
    from vlmclassifier.vlm import load_vlm

    images = [draw(random.Random(f"{args.seed}:{i}")) for i in range(args.pictures)]
    names = class_names(BENCHMARKS["imagenet"])
    folder = Path(tempfile.mkdtemp(prefix="bench-classify-"))
    try:
        for key in ("llava-1.5-7b", "clip-vit-l-336"):
            make_tiny(MODELS[key], folder / key, args.seed)
        vlm = load_vlm("llava-1.5-7b", folder / "llava-1.5-7b", args.device)
        clip = load_clip("clip-vit-l-336", folder / "clip-vit-l-336", args.device)
        ratios = {
            "batched_vs_single": lambda _: batched_vs_single(vlm, images),
            "clip_class_features_once_vs_per_batch": lambda _: features_once_vs_per_batch(clip, images, names),
            "resume_overhead": lambda number: resume_overhead(folder / f"run-{number}", args.batches),
        }
        medians = {}
        for name, measure in ratios.items():
            measure("warm-up")
            values = [measure(number) for number in range(args.repeats)]
            medians[name] = round(statistics.median(values), 4)
            print(f"{name}: {', '.join(f'{value:.4f}' for value in values)}", flush=True)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(medians | {"device": str(vlm.model.device), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
