"""A finished ranking run as numbers: every way of scoring its names, from the stored log-probabilities alone."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from vlmclassifier.models import MODELS, OPENING
from vlmclassifier.ranking.scores import BLOCK, GRID, Scoring, choose, curve, held_out, ranks
from vlmclassifier.records import Score, UserError
from vlmclassifier.runs import read_record, read_run
from vlmclassifier.scoring import wilson_interval
from vlmclassifier.tables import model_of
from vlmclassifier.values import ROWS, read_values

PRIORS = {"no_image": "", "mean": "_mean_prior"}  # of guidance: what its settings' names end with
SAME = ("model", "checkpoint", "dtype", "benchmark", "manifest", "template", "wording", "opening",
        "paper_tokenisation", "classes")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way of scoring: which pictures it gets right first, and among the first five."""

    setting: str
    scoring: Scoring
    top1: np.ndarray  # bool [pictures]
    top5: np.ndarray | None  # None where t differs between the pictures
    chosen_on: str = ""  # where t was chosen


@dataclass(frozen=True)
class Ranking:
    """The stored numbers of one run, in the evaluation order."""

    config: dict
    ids: list[str]
    sums: np.ndarray  # float32 [pictures, names]
    lengths: np.ndarray  # [names] tokens
    no_image: np.ndarray  # float32 [names] the prior behind the prompt without the picture
    truth: np.ndarray  # [pictures] place of the true name
    first: np.ndarray  # bool [pictures] whether the true class is the first that bears its name
    _curves: dict = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def half(self) -> np.ndarray:
        """The half of the pictures that each belongs to, by its id alone: bool [pictures]."""
        return np.array([hashlib.sha256(i.encode()).digest()[0] % 2 == 1 for i in self.ids])

    def prior(self, kind: str) -> np.ndarray:
        """log p(name | prompt): "no_image" (default), or "mean" over the pictures as in the reference code."""
        return self.no_image if kind == "no_image" else self._mean

    @cached_property
    def _mean(self) -> np.ndarray:
        return self.sums.mean(axis=0, dtype=np.float64)

    def ranks(self, scoring: Scoring) -> np.ndarray:
        """How many names are scored above the true one [pictures]."""
        blocks = [slice(start, start + BLOCK) for start in range(0, len(self.sums), BLOCK)]
        return np.concatenate([ranks(scoring(self.sums[b], self.lengths), self.truth[b]) for b in blocks])

    def curve(self, per_token: bool, kind: str = "no_image") -> np.ndarray:
        """Top-1 hits for every t of GRID: bool [grid, pictures]. Worked out once: on ImageNet it takes a while."""
        if (per_token, kind) not in self._curves:
            hits = curve(self.sums, self.lengths, self.truth, self.prior(kind), per_token)
            self._curves[per_token, kind] = hits
        return self._curves[per_token, kind]

    def ways(self, train: "Ranking | None" = None) -> Iterator[Way]:
        """Sum, mean, and guidance with both priors (paper section 2).

        Each guided way twice: with the best whole t on these very pictures, as the paper does it, and ("_held_out")
        with t chosen on `train`, else for each half of the pictures on the other half.
        """
        for name, per_token in (("prob_sum", False), ("prob_avg", True)):
            yield self._way(name, Scoring(per_token))
            for kind, suffix in PRIORS.items():
                whole = [t for t in GRID if t == int(t)]
                table = self.curve(per_token, kind)
                t = whole[choose(table[np.isin(GRID, whole)])]
                yield self._way(f"{name}_cfg{suffix}", Scoring(per_token, t, self.prior(kind)), "these pictures")
                setting = f"{name}_cfg{suffix}_held_out"
                if train is not None:
                    t = GRID[choose(train.curve(per_token, kind))]
                    yield self._way(setting, Scoring(per_token, t, self.prior(kind)), "train")
                else:
                    fold = held_out(table, self.half)
                    yield Way(setting, Scoring(per_token, np.nan), fold, None, "the other half")

    def _way(self, setting: str, scoring: Scoring, chosen_on: str = "") -> Way:
        before = self.ranks(scoring)
        return Way(setting, scoring, before < 1, before < 5, chosen_on)


def read_ranking(folder: Path) -> Ranking:
    """The numbers of a run of rank_labels.py without --top-k. Raises UserError when it is not one or unfinished."""
    record, rows = read_run(folder)
    config = record["config"]
    if config.get("kind") != "ranking" or config.get("top_k") is not None:
        raise UserError(f"{folder} is not a full ranking: run inference_analysis/rank_labels.py without --top-k.")
    if record["finished"] is None:
        raise UserError(f"{folder} is unfinished: repeat its command.")
    ids, tensors = read_values(folder)
    if ids != [row.example_id for row in rows]:
        raise UserError(f"{folder}: the numbers are not those of the rows: repeat its command, which merges them anew.")
    names = list(dict.fromkeys(config["classes"]))
    place = {name: number for number, name in enumerate(names)}
    truth = np.array([place[row.label] for row in rows])
    first = np.array([row.class_index == config["classes"].index(row.label) for row in rows])
    return Ranking(config, ids, tensors[ROWS], tensors["lengths"], tensors["prior"], truth, first)


def of_train(ranking: Ranking, others: Sequence[Ranking]) -> Ranking | None:
    """Among other rankings the one of the train split in which t may be chosen for this one."""
    if ranking.config["split"] in ("train", "all"):  # these hold the train pictures themselves
        return None
    same = [r for r in others if r.config["split"] == "train"
            and all(r.config.get(key) == ranking.config.get(key) for key in SAME)]  # fmt: skip
    return max(same, key=lambda r: len(r.ids), default=None)


def suffix(config: dict) -> str:
    """What the names of a run's settings end with, where it asks otherwise than the paper's main rows."""
    spec = MODELS.get(config["model"])
    parts = [f"-prompt_{config['wording']}"] if config["wording"] != "base" else []
    if config["opening"] != (spec.opening if spec else OPENING):
        parts.append(f"-opening {config['opening']!r}")
    return "".join(parts + ["-paper_tokenisation"] * config["paper_tokenisation"])


def scores_of(
    folder: Path, section: str, table: str, train: Ranking | None = None, ranking: Ranking | None = None
) -> list[Score]:
    """The scores of a finished run, full or --top-k. Raises UserError when it cannot be read.

    `train`: where t is chosen; `ranking`: the full run's own numbers, where they have been read.
    """
    record, rows = (read_record(folder), []) if ranking else read_run(folder)
    config = record["config"]
    end = suffix(config)
    if config["top_k"] is None:
        ranking = ranking or read_ranking(folder)
        ways = [(way.setting + end, way.top1, way.top5, ranking.first) for way in ranking.ways(train)]
    else:
        first = {name: index for index, name in reversed(list(enumerate(config["classes"])))}
        places = np.array([row.ranking for row in rows])  # [pictures, k] class indices
        right = places == np.array([first[row.label] for row in rows])[:, None]
        one = np.array([row.class_index == first[row.label] for row in rows])
        five = right[:, :5].any(axis=1) if config["top_k"] >= 5 else None
        guided = "" if config["guidance"] == 1 else f"_cfg_t{config['guidance']:g}"
        way = {"sum": "prob_sum", "mean": "prob_avg"}[config["score"]] + guided
        ways = [(way + end, right[:, 0], five, one)]
    shared = len(set(config["classes"])) < len(config["classes"])
    scores = []
    for setting, top1, top5, one in ways:
        metrics = {"accuracy": top1, "top5": top5, "accuracy_by_class": top1 & one if shared else None}
        for metric, right in metrics.items():
            if right is not None:
                low, high = wilson_interval(int(right.sum()), len(right))
                numbers = 100 * float(right.mean()), 100 * low, 100 * high, len(right)
                scores.append(Score(section, table, model_of(config), setting, config["benchmark"], metric, *numbers))
    return scores
