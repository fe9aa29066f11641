"""The loss of every step on disk, and the steps at which it jumps or is not finite (Figure 5)."""

import csv
import math
from collections import deque
from pathlib import Path
from typing import NamedTuple

COLUMNS = ["step", "epoch", "loss", "gradient_norm", "learning_rate", "spike", "skipped", "rows"]
WINDOW = 50  # steps that a loss is compared with
LEAST = 10  # steps before the first comparison
DEVIATIONS, FACTOR = 6.0, 1.5  # a spike is this many standard deviations, and this factor, above the window's mean


class Step(NamedTuple):
    """One step of a training."""

    step: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float
    spike: bool
    skipped: bool
    rows: str  # ids of the rows of a spike, separated by spaces


class SpikeWatch:
    """Compares every loss with those before it. Spikes and what is not finite never enter the comparison."""

    def __init__(self, losses: list[float] | None = None) -> None:
        """`losses`: of the steps before, where a training is continued."""
        self.recent: deque[float] = deque(maxlen=WINDOW)
        for loss in losses or ():
            self.is_spike(loss)

    def is_spike(self, loss: float) -> bool:
        """Whether the loss of the next step jumps, or is not finite."""
        if not math.isfinite(loss):
            return True
        if len(self.recent) >= LEAST:
            mean = sum(self.recent) / len(self.recent)
            deviation = (sum((value - mean) ** 2 for value in self.recent) / len(self.recent)) ** 0.5
            if loss > mean + DEVIATIONS * deviation and loss > FACTOR * mean:
                return True
        self.recent.append(loss)
        return False


def append_step(file: Path, step: Step) -> None:
    """Add a row to loss.csv."""
    is_new = not file.exists()
    with open(file, "a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        numbers = [f"{value:.6g}" for value in (step.epoch, step.loss, step.gradient_norm, step.learning_rate)]
        writer.writerow([step.step, *numbers, int(step.spike), int(step.skipped), step.rows])


def read_steps(file: Path) -> list[Step]:
    """The rows of loss.csv."""
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as stream:
        return [
            Step(int(row["step"]), *(float(row[name]) for name in COLUMNS[1:5]), row["spike"] == "1",
                 row["skipped"] == "1", row["rows"])
            for row in csv.DictReader(stream)
        ]  # fmt: skip


def keep_steps(file: Path, last: int) -> list[Step]:
    """Remove the steps after `last` from loss.csv, which a resumed training makes again; return the others."""
    kept = [step for step in read_steps(file) if step.step <= last]
    file.unlink(missing_ok=True)
    for step in kept:
        append_step(file, step)
    return kept
