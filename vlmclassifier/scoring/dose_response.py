"""Doses of naming texts assigned to classes by design, and the slope of accuracy on them (beyond the paper)."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlmclassifier.records import UserError
from vlmclassifier.scoring.statistics import Estimate

RESAMPLES = 400  # of every bootstrap over classes and trainings


class Observation(NamedTuple):
    """One class in one training."""

    training: str
    name: str
    dose: float  # share of the class's images whose texts name it
    texts: int  # texts that name it
    right: int  # right answers among n test images
    n: int


def latin_square(size: int) -> list[list[int]]:
    """Return a Latin square: in every row and every column each of 0 to size - 1 stands once.

    It is balanced for an even size (Williams, 1949): in its rows every number follows every other one equally often.
    """
    first = [0]
    for step in range(1, size):
        first.append((first[-1] + (step if step % 2 else -step)) % size)
    return [[(number + row) % size for number in first] for row in range(size)]


def designed_doses(names: Sequence[str], doses: Sequence[float], seed: int) -> list[dict[str, float]]:
    """Return the dose of every class in each of len(doses) trainings: every class gets every dose once.

    The classes are divided at random (by seed and name) into as many groups of nearly equal size as there are doses.
    Raises UserError for fewer classes than doses.
    """
    if len(names) < len(doses):
        raise UserError(f"{len(names)} classes are fewer than {len(doses)} doses: use a data set with more classes.")
    order = sorted(names, key=lambda name: random.Random(f"dose group:{seed}:{name}").random())
    group_of = {name: place % len(doses) for place, name in enumerate(order)}
    return [{name: doses[row[group_of[name]]] for name in names} for row in latin_square(len(doses))]


def confounded_doses(
    ease: Mapping[str, float], doses: Sequence[float], noise: float, seed: int
) -> dict[str, float]:  # fmt: skip
    """Return a dose for every class that rises with its ease: what an observer finds in a confounded world.

    `ease`: a number per class; classes are ordered by its rank (0 to 1) plus normal noise of this standard deviation.
    """
    ranked = sorted(ease, key=lambda name: (ease[name], random.Random(f"tie:{name}").random()))
    place = {name: rank / len(ranked) for rank, name in enumerate(ranked)}
    order = sorted(ranked, key=lambda name: place[name] + random.Random(f"ease:{seed}:{name}").gauss(0, noise))
    rising = sorted(doses)
    return {name: rising[len(rising) * rank // len(order)] for rank, name in enumerate(order)}


def slope_per_doubling(
    observations: Sequence[Observation], given: Mapping[str, float] | None = None, fixed_effects: bool = False
) -> Estimate:
    """Return the change of the log-odds of a right answer per doubling of the naming texts, by logistic regression.

    Only observations with at least one naming text take part: doubling nothing is nothing. `fixed_effects`: every class
    has an intercept of its own, so that only the same class at different doses is compared. `given`: another predictor
    by class, such as the log-odds of CLIP's accuracy. The 95% interval is a bootstrap over classes and trainings, each
    drawn with replacement. `n` counts the classes. Raises ValueError where accuracy or texts do not vary.
    """
    rows = [row for row in observations if row.texts > 0]
    if fixed_effects:  # a class that is always right or always wrong says nothing about the slope
        totals: dict[str, list[int]] = {}
        for row in rows:
            total = totals.setdefault(row.name, [0, 0])
            total[0] += row.right
            total[1] += row.n
        rows = [row for row in rows if 0 < totals[row.name][0] < totals[row.name][1]]
    names = list(dict.fromkeys(row.name for row in rows))
    trainings = list(dict.fromkeys(row.training for row in rows))
    varies = any(row.right for row in rows) and any(row.right < row.n for row in rows)
    if len(names) < 3 or len({row.texts for row in rows}) < 2 or not varies:
        raise ValueError("three classes with right and wrong answers and two numbers of texts are needed")
    name_of, training_of = (
        np.array([places.index(getattr(row, field)) for row in rows])
        for field, places in (("name", names), ("training", trainings))
    )
    doublings = np.log2([row.texts for row in rows])  # [rows]
    columns = [doublings - doublings.mean()]
    if given is not None:
        values = np.array([given[name] for name in names])
        columns.append((values - values.mean())[name_of])
    intercepts = np.eye(len(names))[name_of] if fixed_effects else np.ones((len(rows), 1))
    design = np.column_stack([*columns, intercepts])  # [rows, predictors]
    right = np.array([row.right for row in rows], dtype=float)
    wrong = np.array([row.n - row.right for row in rows], dtype=float)

    rng, draws = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        of_names = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        of_trainings = np.bincount(rng.integers(len(trainings), size=len(trainings)), minlength=len(trainings))
        weights = of_names[name_of] * of_trainings[training_of]  # [rows] how often each was drawn
        draws.append(_first_coefficient(design, right * weights, wrong * weights))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Estimate(_first_coefficient(design, right, wrong), float(low), float(high), len(names))


def _first_coefficient(design: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> float:
    """The first coefficient of a logistic regression on weighted rows; NaN where only right or wrong ones are left."""
    from sklearn.linear_model import LogisticRegression

    if not right.any() or not wrong.any():
        return float("nan")
    x, y, weights = np.tile(design, (2, 1)), np.repeat([1, 0], len(design)), np.concatenate([right, wrong])
    x, y, weights = (values[weights > 0] for values in (x, y, weights))
    # A large C instead of none: classes that a draw leaves with right answers alone keep a finite intercept.
    model = LogisticRegression(C=1e4, fit_intercept=False, solver="newton-cholesky", tol=1e-6)
    return float(model.fit(x, y, sample_weight=weights).coef_[0, 0])


def dose_curve(observations: Sequence[Observation]) -> list[dict[str, float]]:
    """Return per dose the mean number of naming texts and the accuracy in percent with its bootstrap interval.

    Mean over classes, which are drawn with replacement.
    """
    rows = []
    for dose in sorted({row.dose for row in observations}):
        of_dose = [row for row in observations if row.dose == dose]
        right, n = Counter(), Counter()
        for row in of_dose:
            right[row.name] += row.right
            n[row.name] += row.n
        names = sorted(n)
        accuracy = np.array([100 * right[name] / n[name] for name in names])  # [classes]
        draws = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
        low, high = np.percentile(accuracy[draws].mean(axis=1), [2.5, 97.5])
        texts = sum(row.texts for row in of_dose) / len(of_dose)
        rows.append({"dose": dose, "texts": texts, "accuracy": float(accuracy.mean()), "low": float(low),
                     "high": float(high), "classes": len(names)})  # fmt: skip
    return rows
