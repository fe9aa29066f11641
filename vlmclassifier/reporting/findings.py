"""The six findings of the paper as the report's first lines: a verdict each, from the rows that the sections wrote."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmclassifier.mini.findings import verdict

TITLES = {
    "F1": ("VLMs classify images far worse than CLIP", "section 2, Table 1", ("main_results", "table1")),
    "F2": ("Prompts and decoding do not explain it", "section 3.1, Tables 2 and 9", ("inference_analysis", "figure4")),
    "F3": ("The information is in the hidden states", "section 3.2, Table 3", ("feature_analysis", "layers")),
    "F4": ("The frequency of a class in the training texts decides", "section 3.3, Figure 3",
           ("data_analysis", "bins")),
    "F5": ("Training on classification data closes the gap", "section 3.2, Tables 3 and 4",
           ("training_analysis", "loss")),
    "F6": ("Questions that need the class: training on classes alone costs, mixing gains", "section 4, Table 5",
           ("imagewikiqa", "table5")),
}  # fmt: skip
TABLES_OF_RUNS = ("main_results/table1.csv", "inference_analysis/table2.csv", "feature_analysis/table3.csv")
TOKENS = re.compile(r"(, )?\b(\d+ (tokens|epochs))")  # tags that answers or probes have and CLIP has not
SECTIONS = {"F1": ["main_results"], "F2": ["main_results", "inference_analysis"], "F3": ["feature_analysis"],
            "F4": ["main_results", "data_analysis"], "F5": ["training_analysis"], "F6": ["imagewikiqa"]}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A finding and whether it holds here."""

    key: str
    title: str
    source: str
    figure: tuple[str, str]  # section and name
    word: str  # see word_of
    rows: Sequence[Mapping[str, Any]]
    note: str = ""

    @property
    def css(self) -> str:
        """The class of its mark on the page."""
        return self.word.replace(" ", "-")


def verdicts(rows: Sequence[Mapping[str, Any]], has_runs: bool) -> list[Verdict]:
    """The six findings. `rows`: of all findings.csv; `has_runs`: whether there are runs that no study has judged."""
    found = []
    for key, (title, source, figure) in TITLES.items():
        own = [row for row in rows if row["finding"] == key]
        note = ""
        if not own:
            note = f"Written by {' and '.join(f'{section}/mini_study.py' for section in SECTIONS[key])}."
            if has_runs:
                note = "The small study judges findings; the runs here are in the tables below. " + note
        word = word_of([str(row["holds"]) for row in own])
        if has_runs and word == "not run":
            word = "not judged"
        found.append(Verdict(key, title, source, figure, word, own, note))
    return found


def of_released_models(root: Path) -> list[dict[str, Any]]:
    """Rows for F1 to F3 from the tables of runs that no study has judged: one per data set, on rows with the same tags.

    F1: CLIP is above every VLM in both worlds. F2: so it is above every wording, list and ranking. F3: a probe on a VLM
    is above all of its answers. Miniatures, whose weights are random, are left out. Holds where the intervals do not
    overlap; n is the smaller of the two.
    """
    rows = [row for name in TABLES_OF_RUNS for row in accuracies(root / name)]
    found = []
    for dataset, tags in dict.fromkeys((row["dataset"], row["comparable"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["comparable"]) == (dataset, tags)]
        clips = [row for row in own if "clip" in row["model"].lower() and row["setting"] == "closed_world"]
        answers = [row for row in own if row["setting"] in ("open_world", "closed_world") and row not in clips]
        others = [row for row in own if row["table"] == "table2.csv"]
        probes = [row for row in own if row["table"] == "table3.csv" and row["setting"].endswith("held_out")]
        for finding, above, below, words in (
            ("F1", clips, answers, "CLIP minus the best VLM"),
            ("F2", clips if others else [], answers + others, "CLIP minus the best VLM with any prompt or ranking"),
            ("F3", [row for row in probes if row["model"] in {one["model"] for one in answers + others}],
             answers + others, "the best probe on a VLM minus the best answers"),
        ):  # fmt: skip
            if above and below:
                found.append(compared(finding, max(above, key=best), max(below, key=best), f"{words}, {dataset}"))
    return found


def accuracies(file: Path) -> list[dict[str, Any]]:
    """Our accuracies in a table in the long form; [] where it is absent or of another form."""
    if not file.exists():
        return []
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["metric"] == "accuracy" and row["value"]]
        rows = [row for row in rows if "miniature" not in row["tags"]]
        return [
            row | {name: float(row[name]) for name in ("value", "low", "high", "n")}
            | {"table": file.name, "comparable": TOKENS.sub("", row["tags"])} for row in rows
        ]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return []


def best(row: Mapping[str, Any]) -> float:
    """The accuracy of a row."""
    return row["value"]


def compared(finding: str, first: Mapping[str, Any], second: Mapping[str, Any], words: str) -> dict[str, Any]:
    """The row of a difference, with Newcombe's interval for two independent proportions."""
    value = first["value"] - second["value"]
    low = value - ((first["value"] - first["low"]) ** 2 + (second["high"] - second["value"]) ** 2) ** 0.5
    high = value + ((first["high"] - first["value"]) ** 2 + (second["value"] - second["low"]) ** 2) ** 0.5
    names = f"{words} ({first['model']}, {first['setting']}; {second['model']}, {second['setting']})"
    return {"finding": finding, "metric": names, "value": value, "low": low, "high": high,
            "n": int(min(first["n"], second["n"])), "paper": None, "holds": verdict(low > 0)}  # fmt: skip


def word_of(judged: Sequence[str]) -> str:
    """One verdict from the last columns of a finding's rows; rows that are only reported have none."""
    holds = sum(text.startswith("holds") for text in judged)
    fails = sum(text.startswith("does not hold") for text in judged)
    if holds and fails:
        return "holds in part"
    if holds and all("by construction" in text for text in judged if text.startswith("holds")):
        return "holds by construction"
    if holds or fails:
        return "holds" if holds else "does not hold"
    if any(text.startswith("cannot be judged") for text in judged):
        return "cannot be judged"
    return "reported" if judged else "not run"
