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
from vlmclassifier.scoring.calibration import has_name_scores, log_softmax, read_name_scores
from vlmclassifier.scoring.metrics import Answers
from vlmclassifier.tables import label

KINDS = ("vlm", "api", "clip", "ranking", "probe")
MOST_RUNS = 8  # of a data set
TOP = 5  # names of a ranking
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
    thumbnails: list[str] = field(default_factory=list)
    confusions: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        runs = [{"name": run.name, "kind": run.kind, "calibrated": run.calibrated, "answers": run.answers,
                 "right": run.right, "top": run.top if any(run.top) else None} for run in self.runs]  # fmt: skip
        return {"dataset": self.dataset, "title": self.title, "names": self.names, "ids": self.ids,
                "labels": self.labels, "thumbnails": self.thumbnails, "runs": runs}  # fmt: skip

    def classes(self) -> list[list[Any]]:
        """The accuracy of each class in percent by run: [name, images, accuracies]."""
        rows = []
        labels = np.array(self.labels)
        for place, name in enumerate(self.names):
            own = np.flatnonzero(labels == place)
            if len(own):
                hits = [[run.right[number] for number in own if run.right[number] is not None] for run in self.runs]
                rows.append([name, len(own), [100 * sum(hit) / len(hit) if hit else None for hit in hits]])
        return rows


def browsers(root: Path, folders: Sequence[Path], most: int, notes: list[str]) -> list[Browser]:
    """One browser per data set whose finished runs of the test images are below the root."""
    of_dataset: dict[tuple[str, str], list[Path]] = {}
    for folder in folders:
        config = read_record(folder)["config"]
        if config["kind"] in KINDS and is_shown(config):
            of_dataset.setdefault((config["benchmark"], config["manifest"]), []).append(folder)
    found = []
    for (dataset, _), runs in of_dataset.items():
        try:
            found.append(browser(root, dataset, chosen(runs), most, notes))
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


def chosen(folders: Sequence[Path]) -> list[Path]:
    """The runs to show: models with many runs first, of every model one probe, fine-tuned models last."""
    configs = {folder: read_record(folder)["config"] for folder in folders}
    runs = Counter(config["model"] for config in configs.values() if config["kind"] != "probe")
    ordered = sorted(folders, key=lambda one: (preference(configs[one])[0], -runs[configs[one]["model"]],
                                               preference(configs[one])))  # fmt: skip
    kept: dict[tuple, Path] = {}
    for folder in ordered:
        config = configs[folder]
        setting = "probe" if config["kind"] == "probe" else setting_of(config)
        kept.setdefault((config["model"], setting, config["kind"], str(config.get("adapter"))), folder)
    return list(kept.values())[:MOST_RUNS]


def preference(config: Mapping[str, Any]) -> tuple:
    """The order of a model's runs: open world, closed world, ranking, CLIP, probe; those without an adapter first.

    Of probes the one that is judged on held-out rows comes first.
    """
    kinds = {"vlm": 0, "api": 0, "ranking": 2, "clip": 3, "probe": 4}
    place = kinds[config["kind"]] + (config.get("candidates") == "all" and config["kind"] != "clip")
    setting = setting_of(dict(config))
    return (config.get("adapter") is not None, place, not setting.endswith(("held_out", "logistic")), setting)


def browser(root: Path, dataset: str, folders: Sequence[Path], most: int, notes: list[str]) -> Browser:
    """Read the runs and join them by example; one that cannot be read becomes a note. Raises UserError."""
    rows: dict[Path, dict[str, Prediction]] = {}
    for folder in folders:
        try:
            rows[folder] = {row.example_id: row for row in read_run(folder)[1]}
        except UserError as error:
            notes.append(str(error))
    if not rows:
        raise UserError("none of its runs can be read.")
    everything = {example_id: row for of_run in rows.values() for example_id, row in of_run.items()}
    ids = list(everything)[:most]
    config = read_record(folders[0])["config"]
    names = list(dict.fromkeys(config["classes"]))
    place = {name: number for number, name in enumerate(names)}
    labels = [place[everything[one].label] for one in ids]
    title = BENCHMARKS[dataset].title if dataset in BENCHMARKS else dataset
    found = Browser(dataset, title, names, [], ids, labels, len(everything))
    for folder, of_run in rows.items():
        run, confused = shown_run(root, folder, of_run, ids, names, notes)
        found.runs.append(run)
        if confused:
            found.confusions[run.name] = confused
    return found


def shown_run(
    root: Path, folder: Path, rows: Mapping[str, Prediction], ids: Sequence[str], names: Sequence[str],
    notes: list[str],
) -> tuple[ShownRun, list[tuple[str, str, int]]]:  # fmt: skip
    """A run's column of the browser, and its most frequent confusions of two classes."""
    config = read_record(folder)["config"]
    predictions = list(rows.values())
    answers = Answers(predictions, tuple(config["classes"]), config["kind"])
    right = dict(zip(rows, answers.right, strict=True))
    trained = [tag for tag in config["tags"] if tag.startswith("fine-tuned: ")]
    name = f"{label(display_name(config['model']), ', '.join(trained))}, {setting_of(config)}"
    run = ShownRun(name, config["kind"], "")
    run.answers = [rows[one].output if one in rows else None for one in ids]
    run.right = [int(right[one]) if one in rows else None for one in ids]
    run.top = [None] * len(ids)
    if has_name_scores(config):
        try:
            fill_probabilities(root, folder, run, ids)
        except UserError as error:
            notes.append(f"The probabilities of {folder.name} are not shown: {error}")
    pairs: Counter[tuple[str, str]] = Counter()
    if config["kind"] in ("clip", "ranking", "probe"):
        for row in predictions:
            if row.ranking and config["classes"][row.ranking[0]] != row.label:
                pairs[row.label, config["classes"][row.ranking[0]]] += 1
    else:
        known = {one.lower(): one for one in names}
        for row in predictions:
            said = known.get(row.output.strip().rstrip(".").lower())
            if said and said != row.label:
                pairs[row.label, said] += 1
    return run, [(*pair, count) for pair, count in pairs.most_common(CONFUSIONS)]


def fill_probabilities(root: Path, folder: Path, run: ShownRun, ids: Sequence[str]) -> None:
    """The five likeliest names of each example with their probabilities, at the temperature of calibrate.py."""
    found = read_name_scores(folder)
    temperature = temperature_of(root, folder)
    run.calibrated = "not calibrated" if temperature is None else f"calibrated, T = {temperature:.2f}"
    place = {one: number for number, one in enumerate(found.ids)}
    probabilities = np.exp(log_softmax(found.scores, temperature or 1.0))
    order = np.argsort(-found.scores, axis=1, kind="stable")[:, :TOP]
    for number, one in enumerate(ids):
        if one in place:
            row = place[one]
            run.top[number] = [[int(best), round(100 * float(probabilities[row, best]), 1)] for best in order[row]]


def temperature_of(root: Path, folder: Path) -> float | None:
    """The temperature of a run by calibration.csv; None where it has none."""
    import csv

    file = root / "inference_analysis" / "calibration" / "calibration.csv"
    if not file.exists():
        return None
    with open(file, newline="", encoding="utf-8") as stream:
        return next((float(row["temperature"]) for row in csv.DictReader(stream) if row["run"] == folder.name), None)


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
