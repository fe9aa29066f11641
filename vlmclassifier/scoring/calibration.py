"""Scores of all names as probabilities: a temperature, calibration errors, and accuracy where the model may abstain.

A softmax over the names of a list turns scores into probabilities: summed log-probabilities of a VLM, or CLIP's scaled
similarities. Guo et al., "On Calibration of Modern Neural Networks" (2017); beyond the paper.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmclassifier.records import UserError
from vlmclassifier.runs import read_record, read_rows
from vlmclassifier.runs.vectors import ROWS, read_values
from vlmclassifier.scoring.rankings import SAME_RUN_KEYS, read_ranking

BINS = 15  # of confidence, of equal width, as in Guo et al.
RESAMPLES = 1_000
TEMPERATURES = (0.02, 50.0)  # the range that is searched
TARGET = 0.9  # accuracy at which coverage is reported
CLIP_KEYS = ("model", "checkpoint", "dtype", "benchmark", "data_root", "caption", "classes")


@dataclass(frozen=True)
class NameScores:
    """The scores of all names in a run, in the evaluation order."""

    config: Mapping[str, Any]
    setting: str
    ids: list[str]
    names: list[str]  # different ones
    scores: np.ndarray  # float64 [images, names]
    truth: np.ndarray  # [images] place of the true name

    @cached_property
    def rows_hash(self) -> str:
        """What a temperature was fitted for: the weights, the images and the names."""
        parts = [str(self.config.get("checkpoint")), str(self.config.get("adapter")), *self.ids, *self.names]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def read_name_scores(folder: Path) -> NameScores:
    """The scores of a full ranking, or of a run of classify_clip.py with --save-scores. Raises UserError for others."""
    record = read_record(folder)
    config = record["config"]
    names = list(dict.fromkeys(config["classes"]))
    if config.get("kind") == "ranking":
        ranking = read_ranking(folder)
        return NameScores(config, "prob_sum", ranking.ids, names, ranking.sums.astype(np.float64), ranking.truth)
    if not config.get("scores"):
        raise UserError(f"{folder} keeps no scores of all names: classify_clip.py does it with --save-scores.")
    if record["finished"] is None:
        raise UserError(f"{folder} is unfinished: repeat its command.")
    rows, (ids, tensors) = read_rows(folder)[: record["target"]], read_values(folder)
    if ids[: len(rows)] != [row.example_id for row in rows]:
        raise UserError(f"{folder}: the numbers are not those of the rows: repeat its command, which merges them anew.")
    scores = tensors[ROWS][: len(rows)].astype(np.float64)
    if not np.isfinite(scores).all():
        raise UserError(f"{folder} holds scores that are not finite: remove it and run again with --dtype float32.")
    place = {name: number for number, name in enumerate(names)}
    truth = np.array([place[row.label] for row in rows])
    return NameScores(config, "similarity", ids[: len(rows)], names, scores, truth)


def has_name_scores(config: Mapping[str, Any]) -> bool:
    """Whether `read_name_scores` can read a run, by its configuration."""
    return bool(config.get("scores")) or (config.get("kind") == "ranking" and config.get("top_k") is None)


def may_calibrate(train: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a run on the train split may choose the temperature of another run; both are configurations."""
    keys = SAME_RUN_KEYS if config["kind"] == "ranking" else CLIP_KEYS
    is_train = train["split"] == "train" and config["split"] not in ("train", "all")
    return is_train and train["kind"] == config["kind"] and all(train.get(key) == config.get(key) for key in keys)


def log_softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities [images, names] of scores divided by a temperature."""
    from scipy.special import log_softmax as of_scipy

    return of_scipy(scores / temperature, axis=-1)


def mean_loss(scores: np.ndarray, truth: np.ndarray, temperature: float = 1.0) -> float:
    """The mean negative log-probability of the true names, in nats."""
    return float(-np.take_along_axis(log_softmax(scores, temperature), truth[:, None], axis=1).mean())


def fit_temperature(scores: np.ndarray, truth: np.ndarray) -> float:
    """The temperature with the lowest `mean_loss`. Raises UserError where the best one is at the end of the range.

    The loss is convex in 1 / temperature, so that a bounded search finds the minimum.
    """
    from scipy.optimize import minimize_scalar

    low, high = (1 / bound for bound in reversed(TEMPERATURES))
    found = minimize_scalar(
        lambda inverse: mean_loss(scores, truth, 1 / inverse), bounds=(low, high), method="bounded",
        options={"xatol": 1e-5},
    )  # fmt: skip
    if not low * 1.01 < found.x < high * 0.99:
        raise UserError(
            f"No temperature from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g} fits the {len(truth)} train rows: all of "
            "them are right, or the scores say nothing about them; use more rows."
        )
    return float(1 / found.x)


class Reliability(NamedTuple):
    """One bin of confidence."""

    low: float
    high: float
    confidence: float  # mean
    accuracy: float
    n: int


def confidences(scores: np.ndarray, truth: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The probability of each image's likeliest name, and whether it is the true one [images]."""
    return np.exp(log_softmax(scores, temperature).max(axis=1)), scores.argmax(axis=1) == truth


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[Reliability]:
    """Accuracy by confidence, in bins of equal width that are open below; bins without an image are left out."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # [images]
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            found.append(Reliability(number / bins, (number + 1) / bins, float(confidence[inside].mean()),
                                     float(right[inside].mean()), int(inside.sum())))  # fmt: skip
    return found


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """ECE: the mean over images of the distance between confidence and accuracy of their bin, from 0 to 1."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # [images]
    gaps = np.bincount(place, confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def error_interval(confidence: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the ECE, from 0 on, by a bootstrap over images.

    The ECE of a sample is too large on average, and that of a resample by as much again, so that percentiles would lie
    too high. The lower end is reflected at the estimate, and 0 where a perfectly calibrated model would have such an
    ECE by chance; the upper end lies above the estimate as far as resamples lie from their mean.
    """
    rng, value = np.random.default_rng(0), calibration_error(confidence, right)
    resamples = (rng.integers(len(right), size=len(right)) for _ in range(RESAMPLES))
    drawn = np.array([calibration_error(confidence[one], right[one]) for one in resamples])
    low, high = np.percentile(drawn, [2.5, 97.5])
    upper = value + max(high - drawn.mean(), drawn.mean() - low)
    is_chance = value <= np.percentile(errors_by_chance(confidence), 97.5)
    return 0.0 if is_chance else max(0.0, 2 * value - float(high)), float(upper)


def error_by_chance(confidence: np.ndarray) -> float:
    """The mean ECE of a model that is exactly as often right as it is confident: what is left at this many images."""
    return float(np.mean(errors_by_chance(confidence)))


def errors_by_chance(confidence: np.ndarray) -> list[float]:
    """Draws of the ECE of a model that is exactly as often right as it is confident."""
    rng, count = np.random.default_rng(0), len(confidence)
    return [calibration_error(confidence, rng.random(count) < confidence) for _ in range(RESAMPLES // 5)]


class Coverage(NamedTuple):
    """Accuracy on the images with the highest confidence."""

    coverage: float  # the share of the images that are answered
    accuracy: float
    threshold: float  # the lowest confidence among them


def coverage_curve(confidence: np.ndarray, right: np.ndarray) -> list[Coverage]:
    """Accuracy against coverage, for every confidence that occurs; images of one confidence are answered together."""
    order = np.argsort(-confidence, kind="stable")
    accuracy = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    is_last = np.append(confidence[order][1:] != confidence[order][:-1], True)
    return [Coverage((place + 1) / len(order), float(accuracy[place]), float(confidence[order[place]]))
            for place in np.flatnonzero(is_last)]  # fmt: skip


def coverage_at(curve: list[Coverage], accuracy: float = TARGET) -> Coverage | None:
    """The point of the curve with the largest coverage at this accuracy; None where it is reached nowhere."""
    return next((point for point in reversed(curve) if point.accuracy >= accuracy), None)


def coverage_interval(confidence: np.ndarray, right: np.ndarray, accuracy: float = TARGET) -> tuple[float, float]:
    """The 95% interval of the largest coverage at an accuracy, 0 where it is not reached: a bootstrap's percentiles."""
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(right), size=len(right))
        point = coverage_at(coverage_curve(confidence[drawn], right[drawn]), accuracy)
        found.append(point.coverage if point else 0.0)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def at_threshold(confidence: np.ndarray, right: np.ndarray, threshold: float) -> Coverage:
    """Coverage and accuracy on these images where those below a confidence are not answered."""
    answered = confidence >= threshold
    accuracy = float(right[answered].mean()) if answered.any() else float("nan")
    return Coverage(float(answered.mean()), accuracy, threshold)
