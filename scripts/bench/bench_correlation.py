"""Benchmark the honesty of the intervals of the data analysis: how often they hold what was planted.

    python scripts/bench/bench_correlation.py

Simulated classes with counts as uneven as real ones and 20 answers each. The last line is one JSON object:
null_excludes_zero: the share of draws without any relation whose bootstrap interval of Spearman's coefficient excludes
zero, which should be about 0.05; null_p_below_5_percent: the same for the p of shuffled classes. slope_coverage: the
share of draws with a planted slope (log-odds per decade of counts) and more variation between classes than independent
answers have, whose interval holds the slope; slope_bias: the mean estimate minus the planted slope.
"""

import json
from dataclasses import dataclass

from vlmclassifier import cli

IMAGES = 20  # answers of a class
SLOPE, BETWEEN = 0.5, 0.4  # planted log-odds per decade; standard deviation of the classes' own log-odds


@dataclass
class Args:
    draws: int = 400
    """Draws without a relation."""
    slopes: int = 100
    """Draws with a planted slope."""
    classes: int = 100
    """Classes of a draw."""
    seed: int = 0
    """Seed of the draws."""


def main(args: Args) -> None:
    """Draw, and count how often the intervals are right."""
    cli.check_positive(draws=args.draws, slopes=args.slopes, classes=args.classes)
    import numpy as np
    from tqdm import tqdm

    from vlmclassifier.scoring.correlation import correlate, logistic_slopes, spearman

    rng = np.random.default_rng(args.seed)

    def draw(slope: float) -> tuple[np.ndarray, np.ndarray]:
        """Counts and right answers among IMAGES, both [classes]."""
        counts = np.floor(10 ** rng.uniform(0, 4, args.classes))
        odds = -1 + slope * np.log10(1 + counts) + rng.normal(scale=BETWEEN, size=args.classes)
        return counts, rng.binomial(IMAGES, 1 / (1 + np.exp(-odds)))

    excluded = small = 0
    for _ in tqdm(range(args.draws), "no relation", unit="draw"):
        counts, right = draw(0.0)
        found = correlate(counts, right / IMAGES, spearman)
        excluded += found.low > 0 or found.high < 0
        small += found.p < 0.05
    covered, estimates = 0, []
    for _ in tqdm(range(args.slopes), "planted slope", unit="draw"):
        counts, right = draw(SLOPE)
        n = np.full(args.classes, float(IMAGES))
        (slope,) = logistic_slopes(right, n, {"counts": np.log10(1 + counts)})
        covered += slope.low <= SLOPE <= slope.high
        estimates.append(slope.value)
    print(json.dumps({
        "draws": args.draws, "classes": args.classes, "null_excludes_zero": round(excluded / args.draws, 4),
        "null_p_below_5_percent": round(small / args.draws, 4), "slope_coverage": covered / args.slopes,
        "slope_bias": round(float(np.mean(estimates)) - SLOPE, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
