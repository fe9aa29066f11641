"""Benchmark probes against the reference's loop, and the memory of features that are larger than it.

    python scripts/bench/bench_probing.py
    python scripts/bench/bench_probing.py --memory-rows 5000 --epochs 50

Random features of `--classes` classes, as many as Flowers102 has, are probed in one process, in CPU time. The reference
is the paper's code: one probe at a time, its accuracy on all train and test rows after every epoch. Medians of turns;
the last line is one JSON object:
batched_vs_reference_loop: four probes (seeds) one after the other by the reference's loop, over the same four trained
together, with the predictions for the test rows after every epoch; batched_with_train_accuracy: also those for the
train rows, which the reference computes. lbfgs_vs_reference_loop: the reference's loop of all epochs, run once, over
one fit of the logistic regression (C = 0.1); chosen_lbfgs_vs_reference_loop: over the choice of C and the last fit.
*_accuracy: on the test rows. rss_anon_*_mib: the growth of the process's own memory (RssAnon, without mapped files)
while --memory-rows rows of features are written as shards, and while they are probed: two epochs of the paper's probe,
one of the grid, the class means, and some steps of the logistic regression.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier import cli
from vlmclassifier.records import Example
from vlmclassifier.runs.features import SHARD_ROWS, Features, open_features

if TYPE_CHECKING:
    from torch import Tensor

    from vlmclassifier.probing import ProbeData

SEEDS = (0, 1, 2, 3)
C = 0.1
TURN_EPOCHS = 6  # epochs of one turn of the comparison with four probes
LOGISTIC_STEPS = 3  # of each fit, where the memory is measured


@dataclass
class Args:
    rows: int = 2040
    """Train rows, and as many test rows: those of Flowers102's train split."""
    width: int = 4096
    """Numbers per row."""
    classes: int = 102
    """Classes."""
    epochs: int = 500
    """Epochs of the reference's loop."""
    turns: int = 5
    """Turns; medians are printed."""
    memory_rows: int = 50_000
    """Rows of the features whose memory is measured."""


def main(args: Args) -> None:
    """Measure the memory first, while the process is small, then the times."""
    cli.check_positive(rows=args.rows, width=args.width, classes=args.classes, epochs=args.epochs, turns=args.turns)
    import torch

    results: dict[str, Any] = {"rows": args.rows, "width": args.width, "classes": args.classes,
                               "threads": torch.get_num_threads()}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        results |= memory(args, Path(folder))
    print(f"memory: {results}", flush=True)
    data, truth = made_up(args)
    results |= compare_batched(args, data) | compare_logistic(args, data, truth)
    print(json.dumps(results))


def class_rows(args: Args, seed: int, labels: "Tensor") -> "Tensor":
    """Features [rows, width] in which every class has a direction of its own, as float32."""
    import torch

    centres = torch.randn(args.classes, args.width, generator=torch.Generator().manual_seed(0))
    scales = (
        torch.randn(args.width, generator=torch.Generator().manual_seed(1)).mul(0.5).exp()
    )  # of unequal size, as hidden states
    noise = torch.randn(len(labels), args.width, generator=torch.Generator().manual_seed(seed))
    return (0.13 * centres[labels] + noise) * scales


def made_up(args: Args) -> tuple["ProbeData", "Tensor"]:
    """Train and test rows in memory, and the classes of the test rows."""
    import torch

    from vlmclassifier.probing import ProbeData, held_out_rows
    from vlmclassifier.runs.features import Matrix

    labels = torch.arange(args.rows) % args.classes
    held_out = held_out_rows([str(row) for row in range(args.rows)], labels.tolist(), 0)
    train, test = (Matrix.of(class_rows(args, seed, labels)) for seed in (2, 3))
    return ProbeData(train, labels, held_out, test, args.classes), labels


def reference_loop(data: "ProbeData", epochs: int, seed: int) -> list[float]:
    """The loop of the paper's code on the CPU: its test accuracy after every epoch."""
    import torch

    from vlmclassifier.probing import build_probe

    train, test = data.train[:], data.test[:]
    probe = build_probe(data.train.width, data.class_count, False, seed)
    optimiser, loss_of = torch.optim.Adam(probe.parameters(), lr=1e-3), torch.nn.CrossEntropyLoss()
    accuracies = []
    for _ in range(epochs):
        for start in range(0, len(train), 512):
            optimiser.zero_grad()
            loss = loss_of(probe(train[start : start + 512]), data.classes[start : start + 512])
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            for rows in (train, test):
                found = [probe(rows[start : start + 512]).argmax(dim=1) for start in range(0, len(rows), 512)]
                accuracy = float((torch.cat(found) == data.classes).float().mean())  # the test rows have equal classes
        accuracies.append(accuracy)
    return accuracies


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The CPU time of the process during a call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def compare_batched(args: Args, data: "ProbeData") -> dict[str, float]:
    """Four probes together against four by the reference's loop."""
    from vlmclassifier.probing import train_probes
    from vlmclassifier.probing.gradient import Inputs

    train, test = Inputs([data.train], "cpu"), Inputs([data.test], "cpu")
    epochs = min(TURN_EPOCHS, args.epochs)

    def batched(with_train: bool) -> None:
        for stack in train_probes(train, data.classes, data.class_count, epochs, seeds=SEEDS):
            (stack.predict(test) == data.classes).float().mean(dim=2)
            if with_train:
                (stack.predict(train) == data.classes).float().mean(dim=2)

    ratios: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(args.turns + 1):  # the first turn is a warm-up
        loop = cpu_seconds(lambda: [reference_loop(data, epochs, seed) for seed in SEEDS])[0]
        for with_train, values in ratios.items():
            seconds = cpu_seconds(lambda with_train=with_train: batched(with_train))[0]
            if turn:
                values.append(loop / seconds)
    print(f"batched, every turn: {[round(value, 2) for value in ratios[False]]}", flush=True)
    return {
        "batched_vs_reference_loop": round(statistics.median(ratios[False]), 2),
        "batched_with_train_accuracy": round(statistics.median(ratios[True]), 2),
    }


def compare_logistic(args: Args, data: "ProbeData", truth: "Tensor") -> dict[str, float]:
    """The logistic regression against the whole loop of the reference, and the accuracy of every probe."""
    from vlmclassifier.probing import centroid_probe, fit_logistic, logistic_probe, neighbour_probe, paper_probes
    from vlmclassifier.probing.data import Scale

    loop, accuracies = cpu_seconds(lambda: reference_loop(data, args.epochs, 0))
    fits = [
        cpu_seconds(lambda: fit_logistic(data.train, data.classes, data.class_count, C, Scale.of(data.train)))[0]
        for _ in range(args.turns)
    ]
    seconds, logistic = cpu_seconds(lambda: logistic_probe(data))
    (papers,) = paper_probes([data], truth, min(args.epochs, 50))[0]
    found = {"logistic": logistic, "neighbours": neighbour_probe(data), "centroid": centroid_probe(data),
             "batched_50_epochs": papers.papers}  # fmt: skip
    results = {
        "reference_loop_seconds": round(loop, 1), "lbfgs_seconds": round(statistics.median(fits), 2),
        "lbfgs_vs_reference_loop": round(loop / statistics.median(fits), 1),
        "chosen_lbfgs_vs_reference_loop": round(loop / seconds, 1),
        "reference_best_accuracy": round(max(accuracies), 4), "reference_last_accuracy": round(accuracies[-1], 4),
    }  # fmt: skip
    return results | {f"{name}_accuracy": round(float((result.predictions == truth).float().mean()), 4)
                      for name, result in found.items()}  # fmt: skip


@contextmanager
def growth(results: dict[str, Any], name: str) -> Iterator[None]:
    """Within it, the largest RssAnon of the process is sampled; its growth in MiB is noted."""

    def rss_anon() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    before, largest, is_over = rss_anon(), [0.0], threading.Event()

    def sample() -> None:
        while not is_over.wait(0.01):
            largest[0] = max(largest[0], rss_anon())

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    is_over.set()
    thread.join()
    results[name] = round(largest[0] - before)


def memory(args: Args, folder: Path) -> dict[str, Any]:
    """Write features as the shards of two runs and probe them; the memory that each takes."""
    import torch

    from vlmclassifier.probing import classifiers, grid_probes, paper_probes
    from vlmclassifier.probing.data import ProbeData, held_out_rows

    results: dict[str, Any] = {"memory_rows": args.memory_rows}
    names = [f"class {number}" for number in range(args.classes)]
    splits = {"train": args.memory_rows, "test": 2 * args.classes}
    with growth(results, "rss_anon_extraction_mib"):
        for split, count in splits.items():
            examples = [
                Example(f"{split}-{row}.png", "", names[row % args.classes], row % args.classes, split)
                for row in range(count)
            ]
            ids = [example.id for example in examples]
            run = open_features(folder / split, {"kind": "features", "classes": names}, ids, {}, SHARD_ROWS)
            of_id = dict(zip(ids, examples, strict=True))
            for seed, part in enumerate(run.pending(SHARD_ROWS)):
                rows = [of_id[i] for i in part]
                labels = torch.tensor([row.class_index for row in rows])
                run.write_shard(rows, {"last_token": class_rows(args, seed, labels)})
            run.finish_features()
    train, test = Features(folder / "train"), Features(folder / "test")
    classes = torch.tensor([row.class_index for row in train.rows])
    steps, classifiers.ITERATIONS = classifiers.ITERATIONS, LOGISTIC_STEPS
    with growth(results, "rss_anon_probing_mib"):
        held_out = held_out_rows([row.example_id for row in train.rows], classes.tolist(), 0)
        data = ProbeData(train.matrix("last_token"), classes, held_out, test.matrix("last_token"), args.classes)
        truth = torch.tensor([row.class_index for row in test.rows])
        paper_probes([data], truth, 2)
        grid_probes([data], 1)
        classifiers.centroid_probe(data)
        classifiers.logistic_probe(data)
    classifiers.ITERATIONS = steps
    return results | {"features_mib": round(args.memory_rows * args.width * 4 / 2**20)}


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
