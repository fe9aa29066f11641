"""Measure how much two processes on two cores do together over one process on one core: they share a run folder only.

    python scripts/bench_scaling.py
    python scripts/bench_scaling.py --processes 4 --pictures 128

Every process is kept on one core, loads the same miniature, waits for the others, and takes leases until the run is
done; only that time counts. The settings alternate. The last line is one JSON object: ratio, the median.
"""

import json
import multiprocessing
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
from vlmclassifier.records import UserError


@dataclass
class Args:
    processes: int = 2
    """Processes that are compared with one."""
    pictures: int = 256
    """Pictures in a run."""
    batch_size: int = 4
    """Pictures in a lease."""
    max_new_tokens: int = 48
    """Longest answer."""
    repeats: int = 5
    """Measurements of the ratio; the median counts."""
    seed: int = 0
    """Seed of the pictures and of the random weights."""


def main(args: Args) -> None:
    """Alternate one process and several; every run has a new folder."""
    cli.check_positive(processes=args.processes, pictures=args.pictures, batch_size=args.batch_size,
                       max_new_tokens=args.max_new_tokens, repeats=args.repeats)  # fmt: skip
    from make_pictures import draw
    from tqdm import trange

    from vlmclassifier.models import MODELS
    from vlmclassifier.tiny import make_tiny

    folder = Path(tempfile.mkdtemp(prefix="bench-scaling-"))
    try:
        for number in range(args.pictures):
            draw(random.Random(f"{args.seed}:{number}")).save(folder / f"{number}.png")
        make_tiny(MODELS["llava-1.5-7b"], folder / "model", args.seed)
        ratios = []
        for repeat in trange(args.repeats, unit="repeat"):
            one, several = (measure(args, folder, repeat, count) for count in (1, args.processes))
            ratios.append(one / several)
            print(
                f"1 process {one:.1f} s, {args.processes} processes {several:.1f} s: ratio {ratios[-1]:.2f}", flush=True
            )
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"ratio": round(statistics.median(ratios), 3), "processes": args.processes,
                      "cores": os.cpu_count(), "ratios": [round(ratio, 3) for ratio in ratios]}))  # fmt: skip


def measure(args: Args, folder: Path, repeat: int, count: int) -> float:
    """Seconds from the moment that all of `count` processes are ready to that when the run is whole."""
    run, context = folder / f"run-{repeat}-{count}", multiprocessing.get_context("spawn")
    ready, ended = context.Barrier(count + 1, timeout=600), context.SimpleQueue()
    workers = [context.Process(target=work, args=(args, folder, run, ready, ended, place)) for place in range(count)]
    for worker in workers:
        worker.start()
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        raise UserError("A worker did not start within ten minutes (see above).") from None
    start = time.monotonic()  # one clock for all processes
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise UserError("A worker stopped (see above).")
    rows = (run / "predictions.jsonl").read_text(encoding="utf-8").count("\n")
    if rows != args.pictures:
        raise UserError(f"{run} has {rows} rows instead of {args.pictures}.")
    return max(ended.get() for _ in workers) - start


def work(args: Args, folder: Path, run_folder: Path, ready: object, ended: object, place: int) -> None:
    """One process on a core of its own, as the classify scripts do it."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[place % len(cores)]})
    import torch

    from vlmclassifier.images import open_image, prefetch
    from vlmclassifier.records import Prediction
    from vlmclassifier.runs import open_run
    from vlmclassifier.vlm import load_vlm

    torch.set_num_threads(1)
    vlm = load_vlm("llava-1.5-7b", folder / "model", "cpu")
    vlm.model.generation_config.eos_token_id = None  # every answer has all its tokens
    prompt = vlm.prompt("What type of object is in this photo?")
    vlm.ask(open_image(folder / "0.png"), "Warm?")

    def load(ids: list[str]) -> dict:
        return vlm.prepare([open_image(folder / i) for i in ids], [prompt] * len(ids))

    ready.wait()
    run = open_run(run_folder, {"model": "bench", "limit": None}, [f"{n}.png" for n in range(args.pictures)])
    for ids, inputs in prefetch(run.pending(args.batch_size), load):
        answers = vlm.generate(inputs, args.max_new_tokens)
        run.append([Prediction(i, "", 0, prompt, None, a, None, None) for i, a in zip(ids, answers, strict=True)])
    run.finish()
    ended.put(time.monotonic())


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
