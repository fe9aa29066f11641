"""Print Tables 1 and 8 from whatever runs exist, ours beside the paper's numbers, and how the metrics differ.

    python main_results/table.py
    python main_results/table.py --format latex
    python main_results/table.py --semantic all-MiniLM-L6-v2

Writes table1, table8, other_settings and metrics as .md, .csv and .tex beside the runs (table1.csv in long form, with
every metric). Outputs of the paper's own code become runs by main_results/import_outputs.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import Score, UserError
from vlmclassifier.scoring.metrics import METRICS
from vlmclassifier.scoring.runs import CLASSIFY_KINDS, collect_runs
from vlmclassifier.tables import (
    LEGEND,
    compare,
    difference_table,
    markdown,
    metric_table,
    only_run,
    summary,
    wide_table,
    write_tables,
)

if TYPE_CHECKING:
    from vlmclassifier.scoring.semantic import Encoder

PAPER = Path(__file__).parent / "paper.csv"
SETTINGS = ("open_world", "closed_world")  # other settings belong to other tables
SHOWN_METRICS = ("mean_per_class", "exact", "contains_words", "unique", "no_class")
SYNONYMS = {"without_synonyms": "accuracy", "with_synonyms": "contains_synonym"}  # Table 8: setting -> our metric
OTHER_SETTINGS = (
    "Runs with other settings (numbers of candidates, orders, wordings, seeds), in percent. "
    "inference_analysis/table.py compares those of Tables 2, 9 and 12 with the paper."
)
DIFFERENCES = (
    "How the metrics differ from the paper's, which asks whether the label is a substring of the answer: of n answers "
    "of all runs above, those that are right by the paper's metric only or by this one only, with the most frequent "
    "answer."
)


@dataclass
class Args:
    outputs: Path = OUTPUTS / "main_results"
    """Folder of the run folders."""
    all: bool = False
    """Also show the rows of the paper that were not run."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""
    metrics: tuple[Literal[("all", *METRICS)], ...] = SHOWN_METRICS
    """Metrics to print beside the accuracy; the .csv has every one."""
    semantic: Path | None = None
    """Folder of a sentence-transformers model: adds the metric "semantic" (the class nearest to the answer)."""


def main(args: Args) -> None:
    """Score every run; write and print the tables."""
    import pandas as pd

    # ---- collect
    collected = collect_runs([args.outputs], CLASSIFY_KINDS, load_encoder(args.semantic))
    scores = [score for score in collected.scores if score.setting in SETTINGS]
    others = [score for score in collected.scores if score.setting not in SETTINGS]
    runs = [run for run in collected.runs if run.scores[0].setting in SETTINGS]
    not_applicable = {cell for cell in collected.not_applicable if cell[1] in SETTINGS}
    if not collected.scores and not not_applicable:
        notes = "".join(f"\nNote: {note}" for note in collected.notes)
        raise UserError(f"No finished run of Table 1 in {args.outputs}: start with main_results/table1.sh.{notes}")

    # ---- compare with the paper
    models = list(pd.read_csv(PAPER)["model"].unique())
    first, eighth = compare(scores, PAPER, "table1"), compare(synonym_scores(scores), PAPER, "table8")
    table1 = only_run(wide_table(first, list(PAPER_BENCHMARKS), models, not_applicable), args.all)
    side_by_side = eighth.assign(dataset=eighth["setting"], setting="open_world")
    table8 = only_run(wide_table(side_by_side, list(SYNONYMS), models), args.all)
    differences = difference_table(runs)
    other = compare(others, PAPER, "")
    other_settings = metric_table(other) if others else pd.DataFrame(columns=["model", "setting", "dataset", "n"])

    # ---- write and print
    files = [
        write_tables(table1, first, args.outputs, "table1"),
        write_tables(table8, eighth, args.outputs, "table8"),
        write_tables(other_settings, other, args.outputs, "other_settings", OTHER_SETTINGS),
        write_tables(differences, differences, args.outputs, "metrics", DIFFERENCES),
    ]
    if args.format != "markdown":
        for forms in files:
            print(forms[("markdown", "csv", "latex").index(args.format)].read_text(encoding="utf-8"))
        return
    print(f"Table 1: accuracy in percent\n\n{markdown(table1)}\n\n{summary(first)}\n")
    if len(table8):
        print(f"Table 8: on ImageNet, without and with WordNet's other names of a class\n\n{markdown(table8)}\n")
    print(f"{LEGEND}\n")
    if scores:
        chosen = list(METRICS) if "all" in args.metrics else args.metrics
        more = [metric for metric in chosen if metric != "accuracy"]
        print(f"More metrics of our runs, in percent\n\n{markdown(metric_table(first, more))}\n")
        if len(differences):
            print(f"{DIFFERENCES}\n\n{markdown(differences)}\n")
    if others:
        print(f"{OTHER_SETTINGS}\n\n{markdown(other_settings)}\n")
    for note in collected.notes:
        print(f"Note: {note}")
    print("Written: " + ", ".join(str(file) for forms in files for file in forms))


def load_encoder(folder: Path | None) -> "Encoder | None":
    """The model of --semantic."""
    if folder is None:
        return None
    from vlmclassifier.scoring.semantic import Encoder

    return Encoder(folder)


def synonym_scores(scores: Sequence[Score]) -> list[Score]:
    """The rows of Table 8: ImageNet in the open world, by the paper's metric and by contains_synonym."""
    runs = {(score.model, score.tags, score.dataset) for score in scores if score.metric == "contains_synonym"}
    rows = []
    for setting, metric in SYNONYMS.items():
        for score in scores:
            of_run = (score.model, score.tags, score.dataset)
            if score.metric == metric and score.setting == "open_world" and of_run in runs:
                rows.append(replace(score, setting=setting, metric="accuracy"))
    return rows


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
