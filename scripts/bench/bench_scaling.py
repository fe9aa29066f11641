"""Benchmark the throughput of several processes on one core each, over one process; they share only a run folder.

    python scripts/bench/bench_scaling.py
    python scripts/bench/bench_scaling.py --processes 4 --images 128

Every process is bound to one core, loads the same miniature, waits for the others, and takes leases until the run is
finished; only the time from then on counts. One and several processes alternate. The last line is one JSON object with
the median as `ratio`.
"""

import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.generated_images import generated_image
from vlmclassifier.records import UserError


@dataclass
class Args:
    processes: int = 2
    """Number of processes that is compared with one process."""
    images: int = 256
    """Images per run."""
    batch_size: int = 4
    """Images per lease."""
    max_new_tokens: int = 48
    """Tokens per answer."""
    repeats: int = 5
    """Measurements of the ratio; the median is printed."""
    seed: int = 0
    """Seed of the images and of the random weights."""


def main(args: Args) -> None:
    """Measure one process and several in turn, each in a new run folder."""
    cli.check_positive(processes=args.processes, images=args.images, batch_size=args.batch_size,
                       max_new_tokens=args.max_new_tokens, repeats=args.repeats)  # fmt: skip
    from tqdm import trange

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny

    folder = Path(tempfile.mkdtemp(prefix="bench-scaling-"))
    try:
        for number in range(args.images):
            generated_image(random.Random(f"{args.seed}:{number}")).save(folder / f"{number}.png")
        make_tiny(MODELS["llava-1.5-7b"], folder / "model", args.seed)
        ratios = []
        for repeat in trange(args.repeats, unit="repeat"):
            single_seconds = measure_run(args, folder, repeat, 1)
            parallel_seconds = measure_run(args, folder, repeat, args.processes)
            ratios.append(single_seconds / parallel_seconds)
            print(
                f"1 process {single_seconds:.1f} s, {args.processes} processes {parallel_seconds:.1f} s: "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"ratio": round(statistics.median(ratios), 3), "processes": args.processes,
                      "cores": os.cpu_count(), "ratios": [round(ratio, 3) for ratio in ratios]}))  # fmt: skip


def measure_run(args: Args, folder: Path, repeat: int, count: int) -> float:
    """Seconds from the time when all `count` processes are ready until the run is finished."""
    run_folder, context = folder / f"run-{repeat}-{count}", cli.worker_context("vlmclassifier.vlm")
    ready, end_times = context.Barrier(count + 1, timeout=600), context.SimpleQueue()
    workers = []
    for index in range(count):
        worker = context.Process(target=work, args=(args, folder, run_folder, ready, end_times, index))
        worker.start()
        workers.append(worker)
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        raise UserError("A worker process did not start within ten minutes: fix the error above.") from None
    start = time.monotonic()  # the same clock in all processes
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("A worker process failed: fix the error above.")
    rows = (run_folder / "predictions.jsonl").read_text(encoding="utf-8").count("\n")
    if rows != args.images:
        raise UserError(f"{run_folder} has {rows} rows instead of {args.images}.")
    return max(end_times.get() for _ in workers) - start


def work(args: Args, folder: Path, run_folder: Path, ready: object, end_times: object, index: int) -> None:
    """Classify on one core until the run is finished, like the classify scripts. Runs in a worker process."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    import torch

    from vlmclassifier.images import open_image, prefetch
    from vlmclassifier.records import Prediction
    from vlmclassifier.runs import open_run
    from vlmclassifier.vlm import Batch, load_vlm

    torch.set_num_threads(1)
    vlm = load_vlm("llava-1.5-7b", folder / "model", "cpu")
    vlm.model.generation_config.eos_token_id = None  # so that every answer has max_new_tokens tokens
    prompt = vlm.prompt("What type of object is in this photo?")
    vlm.ask(open_image(folder / "0.png"), "Warm?")  # warm-up

    def load(ids: list[str]) -> Batch:
        return vlm.prepare([open_image(folder / name) for name in ids], [prompt] * len(ids))

    ready.wait()
    run = open_run(run_folder, {"model": "bench", "limit": None}, [f"{n}.png" for n in range(args.images)])
    for ids, batch in prefetch(run.pending(args.batch_size), load):
        answers = vlm.generate(batch, args.max_new_tokens)
        predictions = []
        for example_id, answer in zip(ids, answers, strict=True):
            predictions.append(Prediction(example_id, "", 0, prompt, None, answer, None))
        run.append(predictions)
    run.finish()
    end_times.put(time.monotonic())


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
