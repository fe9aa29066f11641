"""The numbers of a ranking run, and every scoring variant of its names, from the stored log-probabilities alone."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmclassifier.class_lists import first_index
from vlmclassifier.models import ANSWER_PREFIX, MODELS
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.runs import read_record, read_rows
from vlmclassifier.runs.vectors import ROWS, read_values
from vlmclassifier.scoring.guidance import BLOCK, GRID, Scoring, best_t, curve, held_out, ranks

PRIORS = {"no_image": "", "mean": "_mean_prior"}  # of guidance -> what its settings' names end with
SCORES = {"sum": ("prob_sum", False), "mean": ("prob_avg", True)}  # score -> setting of paper.csv, per token
SAME_RUN_KEYS = ("model", "checkpoint", "dtype", "benchmark", "data_root", "template", "wording", "answer_prefix",
                 "paper_tokenisation", "classes")  # fmt: skip


@dataclass(frozen=True)
class ScoringVariant:
    """One scoring of the names: which images it gets right first, and among the first five."""

    setting: str
    top1: np.ndarray  # bool [images]
    top5: np.ndarray | None  # bool [images]; None where t differs between the images
    scoring: Scoring | None = None  # None for a search, whose scores are not all stored
    chosen_on: str = ""  # where t was chosen

    @property
    def t(self) -> str:
        """The t of a guided variant, for a table."""
        return "one per half" if np.isnan(self.scoring.t) else f"{self.scoring.t:g}"


@dataclass(frozen=True)
class Ranking:
    """The stored numbers of a full ranking, in the evaluation order."""

    config: dict[str, Any]
    rows: list[Prediction]
    sums: np.ndarray  # float32 [images, names]
    lengths: np.ndarray  # [names] tokens
    no_image: np.ndarray  # float32 [names] the prior behind the prompt without the image
    truth: np.ndarray  # [images] place of the true name
    _curves: dict = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def ids(self) -> list[str]:
        """The example ids."""
        return [row.example_id for row in self.rows]

    @cached_property
    def half(self) -> np.ndarray:
        """The half of the images that each belongs to, by its id alone: bool [images]."""
        return np.array([hashlib.sha256(i.encode()).digest()[0] % 2 == 1 for i in self.ids])

    @cached_property
    def mean_prior(self) -> np.ndarray:
        """The mean over the evaluated images, float64 [names]: the prior of the reference code."""
        return self.sums.mean(axis=0, dtype=np.float64)

    def prior(self, kind: str) -> np.ndarray:
        """log p(name | prompt) [names]: "no_image" (default), or "mean" over the images."""
        return self.no_image if kind == "no_image" else self.mean_prior

    def ranks(self, scoring: Scoring) -> np.ndarray:
        """How many names are scored above the true one [images]."""
        blocks = [slice(start, start + BLOCK) for start in range(0, len(self.sums), BLOCK)]
        return np.concatenate([ranks(scoring(self.sums[b], self.lengths), self.truth[b]) for b in blocks])

    def curve(self, per_token: bool, kind: str = "no_image") -> np.ndarray:
        """Top-1 hits for every t of GRID: bool [grid, images]. Kept, because on ImageNet it takes a while."""
        if (per_token, kind) not in self._curves:
            hits = curve(self.sums, self.lengths, self.truth, self.prior(kind), per_token)
            self._curves[per_token, kind] = hits
        return self._curves[per_token, kind]

    def variants(self, train: "Ranking | None" = None) -> Iterator[ScoringVariant]:
        """Sum, mean, and guidance with both priors (paper, section 3.1).

        Each guided variant twice: with the best whole t on these very images, as in the paper, and ("_held_out") with t
        chosen on `train`, else for each half of the images on the other half.
        """
        whole = [t for t in GRID if t == int(t)]
        for name, per_token in SCORES.values():
            yield self._variant(name, Scoring(per_token))
            for kind, suffix in PRIORS.items():
                hits, prior = self.curve(per_token, kind), self.prior(kind)
                t = whole[best_t(hits[np.isin(GRID, whole)])]
                yield self._variant(f"{name}_cfg{suffix}", Scoring(per_token, t, prior), "these images")
                setting = f"{name}_cfg{suffix}_held_out"
                if train is not None:
                    t = GRID[best_t(train.curve(per_token, kind))]
                    yield self._variant(setting, Scoring(per_token, t, prior), "train")
                else:
                    top1 = held_out(hits, self.half)
                    yield ScoringVariant(setting, top1, None, Scoring(per_token, np.nan), "the other half")

    def _variant(self, setting: str, scoring: Scoring, chosen_on: str = "") -> ScoringVariant:
        better = self.ranks(scoring)
        return ScoringVariant(setting, better < 1, better < 5, scoring, chosen_on)


def read_ranking(folder: Path) -> Ranking:
    """The numbers of a run of rank_labels.py without --top-k. Raises UserError when it is not one or unfinished."""
    record = read_record(folder)
    config = record["config"]
    if config.get("kind") != "ranking" or config.get("top_k") is not None:
        raise UserError(f"{folder} is not a full ranking: run inference_analysis/rank_labels.py without --top-k.")
    if record["finished"] is None:
        raise UserError(f"{folder} is unfinished: repeat its command.")
    rows = read_rows(folder)
    ids, tensors = read_values(folder)
    if ids != [row.example_id for row in rows]:
        raise UserError(f"{folder}: the numbers are not those of the rows: repeat its command, which merges them anew.")
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise UserError(
            f"{folder} holds log-probabilities that are not finite: remove it and run again with --dtype bfloat16 or "
            "float32."
        )
    rows, sums = rows[: record["target"]], tensors[ROWS][: record["target"]]
    place = {name: number for number, name in enumerate(dict.fromkeys(config["classes"]))}
    truth = np.array([place[row.label] for row in rows])
    return Ranking(config, rows, sums, tensors["lengths"], tensors["prior"], truth)


def is_train_run_of(train: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether t may be chosen on one ranking (of the train split) for another; both are configurations of runs."""
    if train["split"] != "train" or train.get("top_k") is not None:
        return False
    if config["split"] in ("train", "all"):  # these hold the train images themselves
        return False
    return all(train.get(key) == config.get(key) for key in SAME_RUN_KEYS)


def searched_variant(config: dict[str, Any], rows: Sequence[Prediction]) -> ScoringVariant:
    """The one variant of a run with --top-k."""
    first = first_index(config["classes"])
    places = np.array([row.ranking for row in rows])  # [images, k] class indices
    right = places == np.array([first[row.label] for row in rows])[:, None]
    name = SCORES[config["score"]][0] + ("" if config["guidance"] == 1 else f"_cfg_t{config['guidance']:g}")
    return ScoringVariant(name, right[:, 0], right[:, :5].any(axis=1) if config["top_k"] >= 5 else None)


def setting_suffix(config: dict[str, Any]) -> str:
    """What the names of a run's settings end with, where its prompt is not that of the paper's main rows."""
    spec = MODELS.get(config["model"])
    parts = [f"-prompt_{config['wording']}"] if config["wording"] != "base" else []
    if config["answer_prefix"] != (spec.answer_prefix if spec else ANSWER_PREFIX):
        parts.append(f"-answer_prefix {config['answer_prefix']!r}")
    if config["paper_tokenisation"]:
        parts.append("-paper_tokenisation")
    return "".join(parts)
