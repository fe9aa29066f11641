"""From summed log-probabilities to scores and rankings of names, and the choice of t of the guidance (section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 1024  # images that are scored at a time
GRID = np.arange(0, 8.25, 0.25)  # of guidance t; the paper's are the whole numbers


@dataclass(frozen=True)
class Scoring:
    """A score of a name: the sum or mean of its tokens' log-probabilities, guided away from a prior.

    Guided: t * log p(name | image, prompt) + (1 - t) * log p(name | prompt); t = 1 is no guidance. `per_token`: divided
    by the number of tokens ("Avg" in the paper's Table 2).
    """

    per_token: bool = False
    t: float = 1.0
    prior: np.ndarray | None = None  # [names] log p(name | prompt); needed where t is not 1

    def constant(self, count: int) -> np.ndarray:
        """The part of every name's score [names] that is the same for all images."""
        return np.zeros(count) if self.t == 1.0 else (1.0 - self.t) * self.prior.astype(np.float64)

    def __call__(self, sums: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Scores [..., names] of summed log-probabilities [..., names] and token counts [names]."""
        total = self.t * sums.astype(np.float64) + self.constant(len(lengths))
        return total / lengths if self.per_token else total


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k best scores [..., k], best first; of equal ones the first comes first."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def ranks(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many names precede the true place [images] in scores [images, names]; of equal ones the first precedes."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def curve(
    sums: np.ndarray, lengths: np.ndarray, truth: np.ndarray, prior: np.ndarray, per_token: bool,
    grid: Sequence[float] = GRID,
) -> np.ndarray:  # fmt: skip
    """Top-1 hits of every image for every t of the grid: bool [grid, images]."""
    hits = np.empty((len(grid), len(sums)), dtype=bool)
    for start in range(0, len(sums), BLOCK):  # in blocks, since the scores are float64
        part = slice(start, start + BLOCK)
        for row, t in zip(hits, grid, strict=True):
            # Of equal scores argmax takes the first, too.
            row[part] = Scoring(per_token, t, prior)(sums[part], lengths).argmax(axis=1) == truth[part]
    return hits


def best_t(hits: np.ndarray) -> int:
    """The place in the grid with the most hits [grid, images]; of equal ones the smallest t."""
    return int(np.argmax(hits.sum(axis=1)))


def held_out(hits: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Hits [images] where t is chosen for each half of the images (bool [images]) on the other half only."""
    chosen_on_first, chosen_on_second = (best_t(hits[:, half == side]) for side in (False, True))
    return np.where(half, hits[chosen_on_first], hits[chosen_on_second])
