"""What a probe is trained and tested on: rows, classes, the held-out part, standardisation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmclassifier.runs.features import Matrix

HELD_OUT = 0.1  # share of every class's train rows
ROWS = 1024  # rows that are read at a time; a batch of the paper's probe has 512


@dataclass(frozen=True)
class ProbeData:
    """One feature of the train and test rows. All numbers are computed on `device`, batch by batch."""

    train: Matrix  # [rows, width]
    classes: Tensor  # [rows] class indices
    held_out: Tensor  # bool [rows]
    test: Matrix  # [test rows, width]
    class_count: int
    device: str = "cpu"

    @property
    def inner(self) -> tuple[Matrix, Tensor]:
        """The train rows that are not held out, and their classes."""
        rows = (~self.held_out).nonzero()[:, 0]
        return self.train.subset(rows), self.classes[rows]

    @property
    def outer(self) -> tuple[Matrix, Tensor]:
        """The held-out rows, and their classes."""
        rows = self.held_out.nonzero()[:, 0]
        return self.train.subset(rows), self.classes[rows]


@dataclass(frozen=True)
class ProbeResult:
    """What a probe says of the test rows."""

    predictions: Tensor  # [test rows] class indices
    choice: str  # what was chosen, in words


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation [width] of train rows: standardised features are (x - mean) / deviation."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, matrix: Matrix, device: str = "cpu") -> "Scale":
        """That of a matrix, in two passes over its rows. A number that is the same in all rows is centred only."""
        total = torch.zeros(matrix.width, dtype=torch.float64, device=device)
        for batch in matrix.batches(ROWS):
            total += batch.to(device).double().sum(dim=0)
        mean = total / len(matrix)  # [width]
        squares = torch.zeros_like(total)
        for batch in matrix.batches(ROWS):
            squares += (batch.to(device) - mean).square().sum(dim=0)
        deviation = (squares / len(matrix)).sqrt()  # [width]
        # A constant number, whose deviation is rounding alone, carries nothing: it becomes (nearly) zero.
        deviation[deviation <= 1e-6 * mean.abs()] = 1.0
        return cls(mean.float(), deviation.float())

    def __call__(self, batch: Tensor) -> Tensor:
        """Standardised rows [rows, width]."""
        return (batch - self.mean) / self.deviation


def held_out_rows(ids: Sequence[str], classes: Sequence[int], seed: int, share: float = HELD_OUT) -> Tensor:
    """Which rows are held out: a share of every class, at least one where a class has two; by (seed, id) alone.

    Returns bool [rows].
    """
    held_out = torch.zeros(len(ids), dtype=torch.bool)
    for rows in _drawn_by_class(ids, classes, seed):
        count = max(1, round(share * len(rows))) if len(rows) > 1 else 0
        held_out[rows[:count]] = True
    return held_out


def few_shot_rows(ids: Sequence[str], classes: Sequence[int], shots: int, seed: int) -> Tensor:
    """The rows [rows] of a train set with `shots` images of every class, in their order; drawn by (seed, id) alone."""
    return torch.tensor(sorted(row for rows in _drawn_by_class(ids, classes, seed) for row in rows[:shots]))


def _drawn_by_class(ids: Sequence[str], classes: Sequence[int], seed: int) -> list[list[int]]:
    """The rows of each class in a random order that depends on the seed and their ids alone."""
    of_class: dict[int, list[int]] = {}
    for row in range(len(ids)):
        of_class.setdefault(classes[row], []).append(row)
    digest = lambda row: hashlib.sha256(f"{seed}:{ids[row]}".encode()).digest()  # noqa: E731
    return [sorted(rows, key=digest) for rows in of_class.values()]
