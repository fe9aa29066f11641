"""Read the scores of all names as probabilities: calibration, abstaining, and names higher up a tree of classes.

    python inference_analysis/calibrate.py
    python inference_analysis/calibrate.py --outputs outputs/plane_figures/seed-0
    python inference_analysis/calibrate.py --hierarchy my_tree.json

Beyond the paper. Reads full rankings (rank_labels.py) and CLIP's scores (main_results/classify_clip.py --save-scores)
of the test split, each with its run of the train split (--split train, the same options): the temperature and the
confidence below which the model abstains are chosen there. Writes into OUTPUTS/inference_analysis/calibration:
calibration.csv (a row per run: calibration error before and after, coverage at 90% accuracy), reliability.csv,
coverage.csv and hierarchy.csv (where the benchmark has a tree: ImageNet, PlaneFigures, or --hierarchy).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier import cli
from vlmclassifier.models import display_name
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import UserError
from vlmclassifier.runs import OldFormatError, read_record
from vlmclassifier.tables import markdown, write_csv

if TYPE_CHECKING:
    from vlmclassifier.scoring.calibration import NameScores

Tables = dict[str, list[dict[str, Any]]]  # the name of a file -> its rows
POINTS = 200  # of a coverage curve in the table
NOTES = """Percent. ECE: the mean distance between confidence and accuracy over 15 bins, with the 95% interval of a
bootstrap; chance: the ECE of a perfectly calibrated model with these confidences and this number of images. T: the
temperature with the lowest loss on the train images. Coverage: the largest share of the test images that are answered
with 90% accuracy, the most confident first; abstaining: the same with the threshold that the train images choose."""


@dataclass
class Args:
    outputs: Path = OUTPUTS
    """Folder with main_results and inference_analysis."""
    hierarchy: Path | None = None
    """Tree of your own classes: {"leaves": {class: node}, "parents": {node: [nodes]}, "names": {node: words}}."""


def main(args: Args) -> None:
    """Calibrate every run, write and print."""
    rows, files = calibrate(args.outputs, args.hierarchy)
    print(f"{readable(rows)}\n\n{NOTES}\n\nWritten: {', '.join(map(str, files))}. "
          f"Next: python scripts/report.py --outputs {args.outputs}")  # fmt: skip


def calibrate(outputs: Path, hierarchy: Path | None = None) -> tuple[Tables, list[Path]]:
    """Find the runs, calibrate each with its train run; returns the tables and their files.

    Raises UserError where no run can be calibrated; one that cannot is reported.
    """
    from vlmclassifier.scoring.calibration import read_name_scores

    runs = find_runs(outputs)
    if not runs:
        raise UserError(
            f"No scores of all names below {outputs}: run inference_analysis/rank_labels.py, or "
            "main_results/classify_clip.py with --save-scores, on the test split and with --split train."
        )
    rows: Tables = {"calibration": [], "reliability": [], "coverage": [], "hierarchy": []}
    for folder, train in runs.items():
        try:
            if train is None:
                raise UserError("no run of the train split beside it: repeat its command with --split train --limit "
                                "1000; without it no temperature is chosen.")  # fmt: skip
            for name, found in of_run(folder, read_name_scores(folder), read_name_scores(train), hierarchy).items():
                rows[name] += found
        except UserError as error:
            print(f"{folder.name} is left out: {error}")
    if not rows["calibration"]:
        raise UserError(f"No run below {outputs} can be calibrated: see above.")
    out = outputs / "inference_analysis" / "calibration"
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, found in rows.items():
        (out / f"{name}.csv").unlink(missing_ok=True)  # rows of an earlier call
        if found:
            files.append(write_csv(out / f"{name}.csv", found))
    return rows, files


def find_runs(outputs: Path) -> dict[Path, Path | None]:
    """Every finished test run with scores of all names -> its run of the train split with the most images."""
    from vlmclassifier.scoring.calibration import has_name_scores, may_calibrate

    records = {}
    for top in ("inference_analysis", "main_results", "main_results/train"):
        for file in sorted((outputs / top).glob("*/run.json")):
            try:
                record = read_record(file.parent)
            except OldFormatError:
                continue
            if record["finished"] and has_name_scores(record["config"]):
                records[file.parent] = record
    found: dict[Path, Path | None] = {}
    for folder, record in records.items():
        if record["config"]["split"] == "train":
            continue
        trains = [one for one, other in records.items() if may_calibrate(other["config"], record["config"])]
        found[folder] = max(trains, key=lambda one: records[one]["rows"], default=None)
    return found


def of_run(folder: Path, test: "NameScores", train: "NameScores", hierarchy: Path | None = None) -> Tables:
    """The rows of every table for one run. Raises UserError where both splits share images."""
    import numpy as np

    from vlmclassifier.scoring import calibration as c
    from vlmclassifier.scoring.hierarchy import CERTAINTIES, hierarchical, hierarchy_of
    from vlmclassifier.scoring.intervals import wilson_interval

    if shared := set(train.ids) & set(test.ids):
        raise UserError(f"{folder}: {len(shared)} images are in its train run too, such as {min(shared)}: fix the "
                        "manifest and run both again.")  # fmt: skip
    t = c.fit_temperature(train.scores, train.truth)
    common = {
        "run": f"{folder.parent.name}/{folder.name}", "model": display_name(test.config["model"]),
        "setting": test.setting, "dataset": test.config["benchmark"], "tags": ", ".join(test.config["tags"]),
    }  # fmt: skip
    rows: Tables = {"reliability": [], "coverage": [], "hierarchy": []}
    numbers: dict[str, float] = {}
    for when, temperature in (("before", 1.0), ("after", t)):
        confidence, right = c.confidences(test.scores, test.truth, temperature)
        low, high = c.error_interval(confidence, right)
        numbers |= {
            f"ece_{when}": 100 * c.calibration_error(confidence, right), f"ece_{when}_low": 100 * low,
            f"ece_{when}_high": 100 * high, f"ece_{when}_by_chance": 100 * c.error_by_chance(confidence),
            f"loss_{when}": c.mean_loss(test.scores, test.truth, temperature),
        }  # fmt: skip
        rows["reliability"] += [common | {"temperature": when} | one._asdict() for one in
                                c.reliability(confidence, right)]  # fmt: skip
    curve = c.coverage_curve(confidence, right)  # of the calibrated probabilities
    places = np.unique(np.linspace(0, len(curve) - 1, POINTS).astype(int))
    rows["coverage"] = [common | curve[place]._asdict() for place in places]
    best, (low, high) = c.coverage_at(curve), c.coverage_interval(confidence, right)
    on_train = c.coverage_at(c.coverage_curve(*c.confidences(train.scores, train.truth, t)))
    kept = c.at_threshold(confidence, right, on_train.threshold if on_train else float("inf"))
    answered = round(kept.coverage * len(right))
    interval = wilson_interval(round(kept.accuracy * answered), answered) if answered else (float("nan"),) * 2
    rows["calibration"] = [common | {
        "rows_hash": test.rows_hash, "n": len(test.ids),
        "accuracy": 100 * float(right.mean()), "train_n": len(train.ids), "temperature": t,
        **numbers, "coverage_90": 100 * (best.coverage if best else 0.0), "coverage_90_low": 100 * low,
        "coverage_90_high": 100 * high, "abstaining_coverage": 100 * kept.coverage,
        "abstaining_accuracy": 100 * kept.accuracy, "abstaining_accuracy_low": 100 * interval[0],
        "abstaining_accuracy_high": 100 * interval[1], "abstaining_threshold": kept.threshold,
    }]  # fmt: skip
    try:
        tree = hierarchy_of(test.config["benchmark"], test.names, hierarchy)
    except UserError as error:  # the tree of another benchmark
        print(f"{folder.name} gets no names of the tree: {error}")
        tree = None
    if tree:
        probabilities = np.exp(c.log_softmax(test.scores, t))
        rows["hierarchy"] = [common | in_percent(hierarchical(tree, probabilities, test.truth, certainty))
                             for certainty in CERTAINTIES]  # fmt: skip
    return rows


def in_percent(named: Any) -> dict[str, Any]:
    """A row of hierarchy.csv, shares in percent."""
    row = named._asdict()
    return row | {key: 100 * row[key] for key in ("certainty", "accuracy", "leaf")}


def readable(rows: Tables) -> str:
    """The tables of calibration and of the hierarchy, short."""
    import pandas as pd

    table = []
    for row in rows["calibration"]:
        ece = [f"{row[f'ece_{when}']:.1f} [{row[f'ece_{when}_low']:.1f}, {row[f'ece_{when}_high']:.1f}] "
               f"(chance {row[f'ece_{when}_by_chance']:.1f})" for when in ("before", "after")]  # fmt: skip
        table.append({
            "run": row["run"], "accuracy": row["accuracy"], "n": str(row["n"]), "T": f"{row['temperature']:.2f}",
            "ECE before": ece[0], "ECE after": ece[1],
            "coverage": f"{row['coverage_90']:.1f} [{row['coverage_90_low']:.1f}, {row['coverage_90_high']:.1f}]",
            "abstaining": f"{row['abstaining_coverage']:.1f} at {row['abstaining_accuracy']:.1f}",
        })  # fmt: skip
    text = markdown(pd.DataFrame(table))
    if rows["hierarchy"]:
        columns = ["run", "certainty", "accuracy", "depth", "classes", "leaf"]
        text += f"\n\nThe deepest name with a given certainty\n\n{markdown(pd.DataFrame(rows['hierarchy'])[columns])}"
    return text


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
