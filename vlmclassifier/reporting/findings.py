"""The six findings of the paper as the report's first lines: a verdict each, from the rows that the sections wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
