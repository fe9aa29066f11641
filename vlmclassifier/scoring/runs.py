"""The collector: every finished run below some folders, of every kind, with its scores.

A run's scores are computed once: `scores.csv` (and `scoring.json` beside it) is read again while the run's rows, its
configuration and the metric registry are unchanged.
"""

import csv
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.models import MODELS, display_name
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import Prediction, Score, UserError
from vlmclassifier.runs import OldFormatError, has_rows, read_record, read_run
from vlmclassifier.runs.store import ROWS_FILE
from vlmclassifier.runs.vectors import VALUES
from vlmclassifier.scoring.differences import Difference, differences
from vlmclassifier.scoring.intervals import class_counts, wilson_interval
from vlmclassifier.scoring.metrics import METRICS, PAPER_METRIC, TEXT_KINDS, Answers, metric_hits

if TYPE_CHECKING:
    from vlmclassifier.scoring.rankings import ScoringVariant
    from vlmclassifier.scoring.semantic import Encoder

JUDGE_FILE = "judge.jsonl"  # of general benchmarks that a model judges
SCORING_VERSION = 4  # raise it when a metric's definition changes: stored scores are then computed anew
CLASSIFY_KINDS = ("vlm", "clip", "api")
Cell = tuple[str, str, str, tuple[str, ...]]  # model, setting, dataset, tags


@dataclass(frozen=True)
class ScoredRun:
    """What the saved rows of one finished run say."""

    folder: Path
    config: dict[str, Any]
    finished: str  # when
    scores: list[Score]
    differences: list[Difference] = field(default_factory=list)  # of answers in words: the metrics against the paper's
    guidance: list[dict[str, Any]] = field(default_factory=list)  # of full rankings: accuracy by score, prior and t
    chosen_t: list[dict[str, Any]] = field(default_factory=list)  # of full rankings: the t of each guided setting


@dataclass
class ScoredRuns:
    """The runs below some folders: of several runs of one cell only the scores of the one that counts."""

    runs: list[ScoredRun] = field(default_factory=list)  # those that count, and all rankings
    scores: list[Score] = field(default_factory=list)
    not_applicable: set[Cell] = field(default_factory=set)  # prompts that do not fit the model's context
    notes: list[str] = field(default_factory=list)  # on runs that are not shown


def run_cell(config: dict[str, Any]) -> Cell:
    """Model, setting, dataset and tags of a classification run, as in paper.csv."""
    is_named = config["kind"] in ("probe", "questions", "vqa")
    setting = config["setting"] if is_named else PromptSetting.from_config(config).name
    return display_name(config["model"]), setting, config["benchmark"], tuple(config["tags"])


def score_run(
    folder: Path, rows: Sequence[Prediction] | None = None, encoder: "Encoder | None" = None, train: Path | None = None
) -> ScoredRun:
    """The scores of one finished run, stored in its folder (scores.csv, classes.csv, scoring.json).

    `rows`: its merged rows, where they are at hand. `encoder` adds the metric "semantic"; such scores are not stored.
    `train`: for a ranking, the folder of the run on whose images t is chosen. Raises UserError when the run cannot be
    read.
    """
    record = read_record(folder)
    key = _key(folder, record["config"], train)
    if encoder is None and (stored := _stored(folder, record, key)):
        return stored
    try:
        if record["config"]["kind"] == "ranking":
            run = _score_ranking(folder, record, train)
        elif record["config"]["kind"] == "questions":
            run = _score_questions(folder, record, rows)
        elif record["config"]["kind"] == "vqa":
            from vlmclassifier.scoring.vqa import score_vqa

            config = record["config"]
            evaluated = read_run(folder)[1] if rows is None else rows[: record["target"]]
            common = (display_name(config["model"]), config["setting"], config["benchmark"])
            run = ScoredRun(folder, config, record["finished"], score_vqa(folder, config, evaluated, common))
        else:
            evaluated = read_run(folder)[1] if rows is None else rows[: record["target"]]
            run = _score_answers(folder, record, evaluated, encoder)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'run.json'} is not a finished run ({error!r}): move the folder away.") from None
    if encoder is None:
        _store(run, key)
    return run


def _score_answers(
    folder: Path, record: dict[str, Any], rows: Sequence[Prediction], encoder: "Encoder | None"
) -> ScoredRun:  # fmt: skip
    config = record["config"]
    answers = Answers(rows, tuple(config["classes"]), config["kind"], encoder)
    hits = metric_hits(answers)
    model, setting, dataset, tags = run_cell(config)
    scores = _scores(answers, hits, model, setting, dataset, tags)
    compared = differences(answers.predictions, hits) if config["kind"] in TEXT_KINDS else []
    if encoder is None:
        _write_classes(folder, config["classes"], rows, hits["accuracy"])
    return ScoredRun(folder, config, record["finished"], scores, compared)


def _score_questions(folder: Path, record: dict[str, Any], rows: Sequence[Prediction] | None) -> ScoredRun:
    """The scores of answers to multiple-choice questions, with intervals over different questions or classes."""
    from vlmclassifier.scoring.questions import Answers, grouped_proportion

    evaluated = read_run(folder)[1] if rows is None else rows[: record["target"]]
    answers = Answers(evaluated, record["config"]["form"])
    model, setting, dataset, tags = run_cell(record["config"])
    scores = [
        Score(model, setting, dataset, metric, *grouped_proportion(hits, answers.groups), tags)
        for metric, hits in answers.metrics().items()
    ]  # fmt: skip
    return ScoredRun(folder, record["config"], record["finished"], scores)


def _score_ranking(folder: Path, record: dict[str, Any], train: Path | None) -> ScoredRun:
    from vlmclassifier.scoring.rankings import read_ranking, searched_variant, setting_suffix

    config = record["config"]
    names, tags, suffix = tuple(config["classes"]), tuple(config["tags"]), setting_suffix(config)
    run = ScoredRun(folder, config, record["finished"], [])
    if config["top_k"] is None:
        ranking = read_ranking(folder)
        train_ranking = read_ranking(train) if train else None
        if train_ranking is not None and set(train_ranking.ids) & set(ranking.ids):
            train_ranking = None  # after a change of the manifest: t must not be chosen on evaluated images
        rows, variants = ranking.rows, list(ranking.variants(train_ranking))
        run.guidance.extend(_guidance_rows(ranking, suffix))
        run.chosen_t.extend(_chosen_t_row(config, variant, suffix) for variant in variants if variant.chosen_on)
    else:
        rows = read_run(folder)[1]
        variants = [searched_variant(config, rows)]
    for variant in variants:
        among_five = None if variant.top5 is None else variant.top5.tolist()
        answers = Answers(rows, names, "ranking", None, variant.top1.tolist(), among_five)
        setting = variant.setting + suffix
        hits = metric_hits(answers)
        if variant is variants[0]:  # the summed log-probabilities, without guidance
            _write_classes(folder, config["classes"], rows, hits["accuracy"])
        run.scores.extend(_scores(answers, hits, display_name(config["model"]), setting, config["benchmark"], tags))
    return run


def _scores(
    answers: Answers, hits: dict[str, Sequence[bool | None]], model: str, setting: str, dataset: str,
    tags: tuple[str, ...],
) -> list[Score]:  # fmt: skip
    """One row per metric, in percent."""
    scores = []
    for metric, values in hits.items():
        value, low, high, n = METRICS[metric].summary(answers, values)
        scores.append(Score(model, setting, dataset, metric, 100 * value, 100 * low, 100 * high, n, tags))
    return scores


def _guidance_rows(ranking: Any, suffix: str) -> list[dict[str, Any]]:
    """Top-1 accuracy in percent for every t, by score and prior."""
    from vlmclassifier.scoring.guidance import GRID
    from vlmclassifier.scoring.rankings import PRIORS, SCORES

    config, rows = ranking.config, []
    common = {"model": display_name(config["model"]), "tags": ", ".join(config["tags"]), "dataset": config["benchmark"]}
    for score, (_, per_token) in SCORES.items():
        for prior in PRIORS:
            for t, hits in zip(GRID, ranking.curve(per_token, prior), strict=True):
                accuracy = 100 * float(hits.mean())
                more = {"score": score + suffix, "prior": prior, "t": float(t), "accuracy": accuracy, "n": len(hits)}
                rows.append(common | more)
    return rows


def _chosen_t_row(config: dict[str, Any], variant: "ScoringVariant", suffix: str) -> dict[str, Any]:
    return {
        "model": display_name(config["model"]), "tags": ", ".join(config["tags"]), "setting": variant.setting + suffix,
        "dataset": config["benchmark"], "t": variant.t, "t chosen on": variant.chosen_on,
    }  # fmt: skip


def collect_runs(
    folders: Sequence[Path], kinds: Collection[str] = tuple(PAPER_METRIC), encoder: "Encoder | None" = None
) -> ScoredRuns:
    """Every finished run below the folders, scored.

    Of several runs of one cell the one with the most examples counts, then a full ranking, then the latest. Rankings of
    the train split choose t for others, CLIP's scores there a temperature; they have no scores of their own. Raises
    UserError when a run cannot be read.
    """
    collected, records = ScoredRuns(), {}
    for folder in [file.parent for top in folders for file in sorted(top.glob("*/run.json"))]:
        try:
            record = read_record(folder)
        except OldFormatError as error:
            collected.notes.append(str(error))
            continue
        if record["config"].get("kind") in (None, *kinds):  # one without a kind is reported when it is scored
            records[folder] = record
    cells: dict[Cell, tuple[tuple, ScoredRun, list[Score]]] = {}
    finished: list[ScoredRun] = []
    tag_of_weights = _weights_tags([record["config"] for record in records.values() if record["finished"]])
    collected.notes += _unverified([record["config"] for record in records.values()])
    for folder, record in records.items():
        config = record["config"]
        if "not_applicable" in record:
            collected.notes.append(f"{folder.name} is N/A: {record['not_applicable']}")
            collected.not_applicable |= _not_applicable_cells(config)
        elif record["finished"] is None:
            collected.notes.append(_unfinished(folder, record))
        else:
            if outside := record["rows"] - record["target"]:
                collected.notes.append(
                    f"{folder.name}: {outside} recorded answers are kept and not scored, because the manifest no "
                    "longer has their images in the evaluation."
                )
            run = score_run(folder, None, encoder, _train_folder(config, records))
            if tag := tag_of_weights.get(_weights_of(config)):
                run = _with_tag(run, tag)
            finished.append(run)
            if not run.scores and config.get("metric") == "judge":
                collected.notes.append(f"{folder.name} is not judged: the same command with --judge MODEL.")
            chooses = config["kind"] == "ranking" or config.get("scores")  # on the train split: t, or a temperature
            if not (chooses and config["split"] == "train"):
                _keep_the_largest(cells, run, collected.notes)
    collected.scores = [score for _, _, scores in cells.values() for score in scores]
    counting = {run.folder for _, run, _ in cells.values()}
    collected.runs = [run for run in finished if run.folder in counting or run.config["kind"] == "ranking"]
    return collected


def _weights_tags(configs: Sequence[dict[str, Any]]) -> dict[str | None, str]:
    """A tag for every checkpoint where several share a row of a table, so that neither replaces the other.

    A checkpoint that is verified as the registered model needs none.
    """
    of_row: dict[tuple, set[str]] = {}  # a row of a table: model and tags
    for config in configs:
        if weights := _weights_of(config):
            of_row.setdefault((config["model"], *config["tags"]), set()).add(weights)
    verified = {_weights_of(config) for config in configs if config.get("verified") and not config.get("adapter")}
    several = [checkpoint for checkpoints in of_row.values() if len(checkpoints) > 1 for checkpoint in checkpoints]
    return {checkpoint: f"weights {checkpoint[:8]}" for checkpoint in several if checkpoint not in verified}


def _weights_of(config: dict[str, Any]) -> str | None:
    """The fingerprint of what a run was made with: fine-tuned weights, else the checkpoint."""
    adapter = config.get("adapter")
    return adapter["fingerprint"] if adapter else config.get("checkpoint")


def _with_tag(run: ScoredRun, tag: str) -> ScoredRun:
    """The same run with another tag on everything that a table shows of it."""
    scores = [replace(score, tags=(*score.tags, tag)) for score in run.scores]
    guidance, chosen_t = (
        [row | {"tags": ", ".join(filter(None, [row["tags"], tag]))} for row in rows]
        for rows in (run.guidance, run.chosen_t)
    )
    return replace(run, scores=scores, guidance=guidance, chosen_t=chosen_t)


def _unverified(configs: Sequence[dict[str, Any]]) -> list[str]:
    """A note for every checkpoint that passes for a registered model and is not listed for it."""
    found = {}
    for config in configs:
        spec = MODELS.get(config.get("model"))
        if spec and spec.source and config.get("checkpoint") and not (config.get("verified") or config["tags"]):
            found[config["model"], config["checkpoint"]] = None
    return [
        f"{display_name(model)} is unverified: the fingerprint of its weights is listed nowhere; if you trust them, "
        f'write "{model}" = "{checkpoint}" into [fingerprints] of paths.toml.'
        for model, checkpoint in found
    ]


def _keep_the_largest(
    cells: dict[Cell, tuple[tuple, ScoredRun, list[Score]]], run: ScoredRun, notes: list[str]
) -> None:  # fmt: skip
    own: dict[Cell, list[Score]] = {}
    for score in run.scores:
        own.setdefault((score.model, score.setting, score.dataset, score.tags), []).append(score)
    for cell, scores in own.items():
        precedence = (scores[0].n, run.config.get("top_k") is None, run.finished)
        if cell in cells:
            note = f"{' / '.join(cell[:3])} has several runs: the one with the most examples, then the latest, counts."
            if note not in notes:
                notes.append(note)
            if cells[cell][0] >= precedence:
                continue
        cells[cell] = (precedence, run, scores)


def _unfinished(folder: Path, record: dict[str, Any]) -> str:
    remove = "" if has_rows(folder) else ", or remove the folder if it was a mistake"
    return f"{folder.name} is unfinished: repeat its command to finish its {record['target']} rows{remove}."


def _not_applicable_cells(config: dict[str, Any]) -> set[Cell]:
    """The cells of a run whose prompt does not fit; a ranking fills one for every scoring of its names."""
    if config["kind"] != "ranking":
        return {run_cell(config)}
    from vlmclassifier.scoring.rankings import PRIORS, SCORES, setting_suffix

    ends = [""] + [f"_cfg{prior}{held_out}" for prior in PRIORS.values() for held_out in ("", "_held_out")]
    settings = [f"{name}{end}{setting_suffix(config)}" for name, _ in SCORES.values() for end in ends]
    model, tags = display_name(config["model"]), tuple(config["tags"])
    return {(model, setting, config["benchmark"], tags) for setting in settings}


def _train_folder(config: dict[str, Any], records: dict[Path, dict[str, Any]]) -> Path | None:
    """The folder of the finished ranking on whose images t may be chosen for this run."""
    if config.get("kind") != "ranking" or config.get("top_k") is not None:
        return None
    from vlmclassifier.scoring.rankings import is_train_run_of

    rows = {
        folder: record["rows"]
        for folder, record in records.items()
        if record["finished"]
        and record["config"].get("kind") == "ranking"
        and is_train_run_of(record["config"], config)
    }
    return max(rows, key=rows.get, default=None)


def _key(folder: Path, config: dict[str, Any], train: Path | None) -> str:
    """What the scores of a run depend on: its rows and configuration, the metrics, and the run that chooses t."""
    parts = [str(SCORING_VERSION), *METRICS, json.dumps(config, sort_keys=True)]
    for file in [top / name for top in (folder, train) if top is not None for name in (ROWS_FILE, VALUES, JUDGE_FILE)]:
        if file.exists():
            with open(file, "rb") as stream:
                parts.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _store(run: ScoredRun, key: str) -> None:
    """Write scores.csv and, last, scoring.json, whose key says what they belong to."""
    columns = [one.name for one in fields(Score)]
    rows = [asdict(score) | {"tags": ", ".join(score.tags)} for score in run.scores]
    _write_csv(run.folder / "scores.csv", columns, rows)
    stored = {
        "key": key, "differences": [asdict(difference) for difference in run.differences], "guidance": run.guidance,
        "chosen_t": run.chosen_t,
    }  # fmt: skip
    new = run.folder / f".scoring.json.{os.getpid()}"
    new.write_text(json.dumps(stored, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(new, run.folder / "scoring.json")


def _stored(folder: Path, record: dict[str, Any], key: str) -> ScoredRun | None:
    """The stored scores of a run; None where they are absent, unreadable or of other rows, metrics or settings."""
    try:
        stored = json.loads((folder / "scoring.json").read_text(encoding="utf-8"))
        if stored["key"] != key or record["config"].get("metric") == "judge":  # the judge is a tag of the scores
            return None
        tags = tuple(record["config"]["tags"])
        scores = []
        with open(folder / "scores.csv", newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                numbers = [float(row[name]) for name in ("value", "low", "high")]
                scores.append(
                    Score(row["model"], row["setting"], row["dataset"], row["metric"], *numbers, int(row["n"]), tags)
                )
        found = [Difference(**difference) for difference in stored["differences"]]
        more = (found, stored["guidance"], stored["chosen_t"])
        return ScoredRun(folder, record["config"], record["finished"], scores, *more)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_classes(
    folder: Path, names: Sequence[str], rows: Sequence[Prediction], hits: Sequence[bool | None]
) -> None:  # fmt: skip
    """classes.csv: the accuracy of each class."""
    counts = class_counts([row.class_index for row in rows], [bool(hit) for hit in hits])
    table = []
    for index, (right, n) in counts.items():
        low, high = wilson_interval(right, n)
        numbers = {"n": n, "right": right, "accuracy": 100 * right / n, "low": 100 * low, "high": 100 * high}
        table.append({"class_index": index, "class": names[index]} | numbers)
    _write_csv(folder / "classes.csv", ["class_index", "class", "n", "right", "accuracy", "low", "high"], table)


def _write_csv(file: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")
    with open(new, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(new, file)
