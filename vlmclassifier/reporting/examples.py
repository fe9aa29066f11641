"""The browser of examples: what several runs say about every image, with thumbnails, and the accuracy of each class."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmclassifier.benchmarks import BENCHMARKS
from vlmclassifier.images import open_image
from vlmclassifier.models import display_name
from vlmclassifier.paths import local_path
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.reporting.collect import setting_of
from vlmclassifier.runs import read_record, read_run
from vlmclassifier.scoring.calibration import NameScores, has_name_scores, log_softmax, read_name_scores
from vlmclassifier.scoring.hierarchy import hierarchy_of
from vlmclassifier.scoring.metrics import Answers
from vlmclassifier.tables import label

KINDS = ("vlm", "api", "clip", "ranking", "probe")
MOST_RUNS = 12  # of a data set
PLACES = {"clip": 2, "ranking": 3, "probe": 2}  # of them that answers in words leave to other kinds
TOP = 5  # names of a ranking
CERTAINTY = 0.9  # of the name in the tree of classes that is shown
SIDE, QUALITY = 96, 60  # of a thumbnail in pixels, of WebP
CONFUSIONS = 20
SHOWN_PROBES = ("last_token", "avg_token", "linear")


@dataclass
class ShownRun:
    """A run in the browser. `right`, `answers`, `top`: in the order of the data set's examples, None where absent."""

    name: str
    kind: str
    calibrated: str
    answers: list[str | None] = field(default_factory=list)
    right: list[int | None] = field(default_factory=list)
    top: list[list[list[float]] | None] = field(default_factory=list)  # [name, probability in percent]
    ancestors: list[str | None] = field(default_factory=list)  # the deepest name that is certain enough


@dataclass
class Browser:
    """The examples of one data set."""

    dataset: str
    title: str
    names: list[str]
    runs: list[ShownRun]
    ids: list[str]
    labels: list[int]  # places in names
    total: int  # examples that the runs have, of which `ids` are the first
    config: Mapping[str, Any]  # of a run of it
    accuracies: list[list[Any]] = field(default_factory=list)  # [class, images, accuracy in percent by run]
    thumbnails: list[str] = field(default_factory=list)
    confusions: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        runs = [{"name": run.name, "kind": run.kind, "calibrated": run.calibrated, "answers": run.answers,
                 "right": run.right, "top": run.top if any(run.top) else None,
                 "ancestors": run.ancestors if any(run.ancestors) else None} for run in self.runs]  # fmt: skip
        return {"dataset": self.dataset, "title": self.title, "names": self.names, "ids": self.ids,
                "labels": self.labels, "thumbnails": self.thumbnails, "runs": runs}  # fmt: skip


def browsers(root: Path, folders: Sequence[Path], most: int, notes: list[str]) -> list[Browser]:
    """One browser per data set (manifest and class list) whose finished runs of the test images are below the root."""
    groups: dict[tuple, dict[Path, Mapping[str, Any]]] = {}
    for folder in folders:
        try:
            config = read_record(folder)["config"]
            if config["kind"] in KINDS and is_shown(config):
                key = (config["benchmark"], config["manifest"], tuple(config["classes"]))
                groups.setdefault(key, {})[folder] = config
        except (UserError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{folder / 'run.json'} lacks what the examples need ({error}): run it again.")
    found = []
    for (dataset, *_), configs in groups.items():
        try:
            found.append(browser(root, dataset, chosen(configs, notes), most, notes))
        except (UserError, KeyError, ValueError, IndexError, TypeError) as error:
            notes.append(f"The examples of {dataset} cannot be shown: {error}")
    return found


def is_shown(config: Mapping[str, Any]) -> bool:
    """Whether a run's answers are among those that are compared: the main settings of the test split."""
    if config["split"] == "train" or config.get("wording") not in (None, "base"):
        return False
    if config["kind"] == "probe":
        return config["setting"].startswith(SHOWN_PROBES) and not any("untrained" in tag for tag in config["tags"])
    return config["kind"] == "ranking" or config["candidates"] in ("none", "all")


def chosen(configs: Mapping[Path, Mapping[str, Any]], notes: list[str]) -> dict[Path, Mapping[str, Any]]:
    """The runs to show, in their order: models with many runs first, of every model one probe, fine-tuned ones last.

    Of several runs of one model, setting and tags the one with the most rows counts, then one with stored scores.
    Rankings, CLIP and probes keep places beside answers in words. What is left out becomes a note.
    """
    runs = Counter(config["model"] for config in configs.values() if config["kind"] != "probe")
    rows = {folder: read_record(folder)["rows"] for folder in configs}
    ordered = sorted(configs, key=lambda one: (preference(configs[one])[0], -runs[configs[one]["model"]],
                                               configs[one]["model"], preference(configs[one]), -rows[one],
                                               not has_name_scores(configs[one])))  # fmt: skip
    kept: dict[tuple, Path] = {}
    for folder in ordered:
        config = configs[folder]
        setting = "probe" if config["kind"] == "probe" else setting_of(dict(config))
        limits = [tag for tag in config["tags"] if " of " not in tag]  # a part of the images is no other model
        key = (config["model"], setting, config["kind"], str(config.get("adapter")), config.get("checkpoint"), *limits)
        kept.setdefault(key, folder)
    folders = list(kept.values())
    reserved = sum(min(count, sum(configs[one]["kind"] == kind for one in folders)) for kind, count in PLACES.items())
    room, shown = dict(PLACES) | {"text": MOST_RUNS - reserved}, []
    for folder in folders:
        kind = configs[folder]["kind"] if configs[folder]["kind"] in PLACES else "text"
        if room[kind] > 0:
            room[kind] -= 1
            shown.append(folder)
    if left := [folder.name for folder in configs if folder not in shown]:
        names = f"{', '.join(left[:8])}{', ...' if len(left) > 8 else ''}"
        notes.append(f"Not among the examples, which show {MOST_RUNS} runs and one of each model and setting: {names}.")
    return {folder: configs[folder] for folder in shown}


def preference(config: Mapping[str, Any]) -> tuple:
    """The order of a model's runs: open world, closed world, ranking, CLIP, probe; those without an adapter first.

    Of probes the one that is judged on held-out rows comes first.
    """
    kinds = {"vlm": 0, "api": 0, "ranking": 2, "clip": 3, "probe": 4}
    place = kinds[config["kind"]] + (config.get("candidates") == "all" and config["kind"] != "clip")
    setting = setting_of(dict(config))
    return (config.get("adapter") is not None, place, not setting.endswith(("held_out", "logistic")), setting)


def browser(
    root: Path, dataset: str, configs: Mapping[Path, Mapping[str, Any]], most: int, notes: list[str]
) -> Browser:  # fmt: skip
    """Read the runs and join them by example; one that cannot be read becomes a note. Raises UserError."""
    rows: dict[Path, dict[str, Prediction]] = {}
    for folder in configs:
        try:
            rows[folder] = {row.example_id: row for row in read_run(folder)[1]}
        except UserError as error:
            notes.append(str(error))
    if not rows:
        raise UserError("none of its runs can be read.")
    everything = {example_id: row for of_run in rows.values() for example_id, row in of_run.items()}
    ids, config = list(everything)[:most], configs[next(iter(rows))]
    names = list(dict.fromkeys(config["classes"]))
    place = {name: number for number, name in enumerate(names)}
    labels = [place[everything[one].label] for one in ids]
    title = BENCHMARKS[dataset].title if dataset in BENCHMARKS else dataset
    found = Browser(dataset, title, names, [], ids, labels, len(everything), config)
    hits: list[dict[str, bool]] = []
    for folder, of_run in rows.items():
        answers = Answers(list(of_run.values()), tuple(config["classes"]), configs[folder]["kind"])
        hits.append(dict(zip(of_run, answers.right, strict=True)))
        run = shown_run(configs[folder], of_run, hits[-1], ids)
        if has_name_scores(configs[folder]):
            try:
                fill_probabilities(root, folder, run, ids)
            except UserError as error:
                notes.append(f"The probabilities of {folder.name} are not shown: {error}")
        found.runs.append(run)
        if confused := confusions(configs[folder], of_run, names):
            found.confusions[run.name] = confused
    found.accuracies = class_accuracies(everything, hits, names)
    return found


def class_accuracies(
    rows: Mapping[str, Prediction], hits: Sequence[Mapping[str, bool]], names: Sequence[str]
) -> list[list[Any]]:  # fmt: skip
    """[class, images, accuracy in percent of every run] over all rows of the runs."""
    of_class: dict[str, list[str]] = {name: [] for name in names}
    for example_id, row in rows.items():
        of_class[row.label].append(example_id)
    table = []
    for name, ids in of_class.items():
        own = [[of_run[one] for one in ids if one in of_run] for of_run in hits]
        if ids:
            table.append([name, len(ids), [100 * sum(hit) / len(hit) if hit else None for hit in own]])
    return table


def shown_run(
    config: Mapping[str, Any], rows: Mapping[str, Prediction], right: Mapping[str, bool], ids: Sequence[str]
) -> ShownRun:  # fmt: skip
    """A run's column of the browser."""
    trained = [tag for tag in config["tags"] if tag.startswith("fine-tuned: ")]
    run = ShownRun(f"{label(display_name(config['model']), ', '.join(trained))}, {setting_of(dict(config))}",
                   config["kind"], "")  # fmt: skip
    run.answers = [rows[one].output if one in rows else None for one in ids]
    run.right = [int(right[one]) if one in rows else None for one in ids]
    run.top, run.ancestors = [None] * len(ids), [None] * len(ids)
    return run


def confusions(
    config: Mapping[str, Any], rows: Mapping[str, Prediction], names: Sequence[str]
) -> list[tuple[str, str, int]]:  # fmt: skip
    """The most frequent pairs of label and another class: the first class of a ranking, or a whole answer in words."""
    pairs: Counter[tuple[str, str]] = Counter()
    known = {one.lower(): one for one in names}
    for row in rows.values():
        said = config["classes"][row.ranking[0]] if row.ranking else known.get(row.output.strip().rstrip(".").lower())
        if said and said != row.label:
            pairs[row.label, said] += 1
    return [(*pair, count) for pair, count in pairs.most_common(CONFUSIONS)]


def fill_probabilities(root: Path, folder: Path, run: ShownRun, ids: Sequence[str]) -> None:
    """The five likeliest names of each example with their probabilities, and the deepest name that is certain enough.

    At the temperature of calibrate.py, where it has one for these very weights, images and names.
    """
    found = read_name_scores(folder)
    temperature = temperature_of(root, found)
    run.calibrated = "not calibrated" if temperature is None else f"calibrated, T = {temperature:.2f}"
    probabilities = np.exp(log_softmax(found.scores, temperature or 1.0))  # [images, names]
    order = np.argsort(-found.scores, axis=1, kind="stable")[:, :TOP]
    tree = hierarchy_of(found.config["benchmark"], found.names)
    deepest = tree.deepest(probabilities, CERTAINTY) if tree else None
    place = {one: number for number, one in enumerate(found.ids)}
    for number, one in enumerate(ids):
        if one not in place:
            continue
        row = place[one]
        run.top[number] = [[int(best), round(100 * float(probabilities[row, best]), 1)] for best in order[row]]
        if tree is not None and deepest is not None:
            node = tree.nodes[deepest[row]]
            certainty = min(1.0, float(probabilities[row, tree.below[deepest[row]]].sum()))
            run.ancestors[number] = f"{tree.names.get(node, node)}, {100 * certainty:.0f}%"


def temperature_of(root: Path, scores: NameScores) -> float | None:
    """The temperature for these weights, images and names by calibration.csv; None where it has none."""
    import csv

    file = root / "inference_analysis" / "calibration" / "calibration.csv"
    if not file.exists():
        return None
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["rows_hash"] == scores.rows_hash]
        return float(rows[0]["temperature"]) if rows else None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} cannot be read: run inference_analysis/calibrate.py again.") from None


def write_thumbnails(found: Browser, images: Path | None, out: Path, number: int) -> int:
    """Write a small WebP of every example into OUT/images and note its path; returns how many could not be made."""
    folder, failed = out / "images" / str(number), 0
    folder.mkdir(parents=True, exist_ok=True)
    for place, example_id in enumerate(found.ids):
        path = ""
        if images is not None:
            try:
                image = open_image(images / example_id, images)
                image.thumbnail((SIDE, SIDE))
                image.save(folder / f"{place}.webp", quality=QUALITY, method=2)
                path = f"images/{number}/{place}.webp"
            except (UserError, OSError, ValueError):
                failed += 1
        found.thumbnails.append(path)
    return failed if images is not None else len(found.ids)


def image_folder(dataset: str, config: Mapping[str, Any], root: Path, given: Path | None) -> Path | None:
    """Where the images of a data set lie: --data-root, the study's, paths.toml's, or what the run says."""
    for folder in (given, root / "images" if dataset == "plane_figures" else None,
                   local_path("benchmarks", dataset) if dataset in BENCHMARKS else None,
                   Path(config["data_root"]) if config.get("data_root") else None):  # fmt: skip
        if folder is not None and folder.is_dir():
            return folder
    return None


def script_data(found: Sequence[Browser]) -> str:
    """The JavaScript file with the data: JSON in which no text can end the script."""
    text = json.dumps([one.data() for one in found], ensure_ascii=False, separators=(",", ":"))
    for letter, escaped in (("<", "\\u003c"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(letter, escaped)
    return f"window.EXAMPLES = {text};\n"
