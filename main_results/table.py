"""Print Table 1 from whatever runs exist: ours beside the paper's numbers.

    python main_results/table.py
    python main_results/table.py --format latex

Writes table1.md, table1.csv (long form, every metric) and table1.tex beside the runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.records import UserError
from vlmclassifier.tables import (
    LEGEND,
    OUTPUTS,
    collect_scores,
    compare,
    details,
    markdown,
    not_applicable,
    wide_table,
    write_tables,
)

PAPER = Path(__file__).parent / "paper.csv"
WORLDS = ("open_world", "closed_world")  # other settings belong to other tables
METRICS = (
    "contains", "exact", "contains_words", "unique", "contains_synonym", "make_model", "real", "mean_per_class",
    "accuracy_by_class", "no_class", "no_candidate", "several_candidates", "echo", "empty", "refusal",
)  # fmt: skip


@dataclass
class Args:
    outputs: Path = OUTPUTS / "main_results"
    """Folder of the run folders."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    import pandas as pd

    scores, notes = collect_scores(args.outputs, "main_results", "table1")
    scores = [score for score in scores if score.setting in WORLDS]
    comparison = compare(scores, PAPER, "table1")
    absent = {cell for cell in not_applicable(args.outputs) if cell[1] in WORLDS}
    table = wide_table(comparison, list(PAPER_BENCHMARKS), list(pd.read_csv(PAPER)["model"].unique()), absent)
    files = write_tables(table, comparison, args.outputs, "table1")
    if args.format != "markdown":
        print(files[("markdown", "csv", "latex").index(args.format)].read_text(encoding="utf-8"))
        return
    print(f"Table 1: accuracy in percent\n\n{markdown(table)}\n\n{LEGEND}\n")
    if scores:
        print(f"All metrics of our runs, in percent\n\n{markdown(details(comparison, METRICS))}\n")
    for note in notes:
        print(f"Note: {note}")
    print("Written: " + ", ".join(map(str, files)))
    if not scores:
        raise UserError(f"No finished run of Table 1 lies below {args.outputs}: start with main_results/table1.sh.")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
