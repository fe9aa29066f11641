"""A run with a stub model through the real vlmclassifier.runs: the child process of the crash tests.

python tests/stub_run.py FOLDER ROWS BATCH SECONDS_PER_BATCH [WIDTH]
"""

import hashlib
import sys
import time
from pathlib import Path

import numpy as np

from vlmclassifier.records import Prediction
from vlmclassifier.runs import Run, open_run

CONFIG = {"model": "stub", "limit": None, "classes": ["a", "b"]}


def order(count: int) -> list[str]:
    """Example ids in evaluation order."""
    return [f"image-{i}.jpg" for i in range(count)]


def answer(example_id: str) -> Prediction:
    """A prediction that depends only on the example id; its length varies between examples."""
    digest = hashlib.sha256(example_id.encode()).hexdigest()
    return Prediction(example_id, "a", 0, "ü?", None, digest * (1 + int(digest[0], 16)), None)


def vector(example_id: str, width: int) -> np.ndarray:
    """A vector of `width` numbers that depends only on the example id."""
    digest = hashlib.sha256(example_id.encode()).digest()
    return np.frombuffer(digest, dtype=np.uint8)[:width].astype(np.float32)


def work(run: Run, batch: int, seconds: float) -> None:
    """Answer all pending examples and finish the run; print each batch of ids and wait `seconds` per batch."""
    if run.width:
        run.keep({"constant": np.arange(3, dtype=np.float32)})
    for ids in run.pending(batch):
        print(*ids, flush=True)
        time.sleep(seconds)
        values = np.stack([vector(i, run.width) for i in ids]) if run.width else None
        run.append([answer(i) for i in ids], values)
    run.finish()


if __name__ == "__main__":
    folder, rows, batch, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    work(open_run(folder, CONFIG, order(rows), int(*sys.argv[5:])), batch, seconds)
