"""Print Table 3 (left) and Table 10 from whatever probes exist: ours beside the paper's numbers.

    python feature_analysis/table.py
    python feature_analysis/table.py --outputs outputs/feature_analysis --format latex

Reads the runs of probe.py. Writes table3, table10 and, where single layers were probed, layers (.md, .csv in the long
form with every metric, .tex) beside them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import UserError
from vlmclassifier.scoring.runs import collect_runs
from vlmclassifier.tables import LEGEND, compare, markdown, metric_table, wide_table, write_tables

PAPER = Path(__file__).parent / "paper.csv"
RULES = """A probe of the paper is judged by the paper's rule: the epoch that is best on the test images. Rows that end
in held_out choose it on held-out train images and are our numbers; last_epoch chooses nothing."""


@dataclass
class Args:
    outputs: Path = OUTPUTS / "feature_analysis"
    """Folder of the runs of probe.py."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    """Collect, compare with the paper, write and print."""
    import pandas as pd

    # ---- collect
    collected = collect_runs([args.outputs], ["probe"])
    if not collected.scores:
        raise UserError(f"No probe in {args.outputs}: start with feature_analysis/probe.sh.")
    papers = pd.read_csv(PAPER)
    files = []

    # ---- one table after the other
    for name, title in (("table3", "Table 3, left: probes"), ("table10", "Table 10: probes on single tokens")):
        scores = [score for score in collected.scores if table_of(score.setting) == name]
        comparison = compare(scores, PAPER, name)
        published = papers[papers["table"] == name]
        settings = [*published["setting"].unique()]
        wide = wide_table(comparison, list(PAPER_BENCHMARKS), [*published["model"].unique()], (), settings)
        files += write_tables(wide, comparison, args.outputs, name)
        if args.format != "markdown":
            print(files[("csv", "latex").index(args.format) - 2].read_text(encoding="utf-8"))
            continue
        print(f"{title}, accuracy in percent\n\n{markdown(wide)}\n")
    layers = [score for score in collected.scores if table_of(score.setting) == "layers"]
    if layers:
        comparison = compare(layers, PAPER, "layers")
        table = metric_table(comparison, ("accuracy",))
        files += write_tables(
            table, comparison, args.outputs, "layers", "Accuracy in percent of probes on single layers."
        )
        if args.format == "markdown":
            print(f"Probes on single layers, accuracy in percent\n\n{markdown(table)}\n")
    if args.format == "markdown":
        print(f"{RULES}\n\n{LEGEND}")
        for note in collected.notes:
            print(f"Note: {note}")
        print("Written: " + ", ".join(str(file) for file in files))


def table_of(setting: str) -> str:
    """The table that shows a probe: table10 has single tokens, and the mean of the prompt that they are from."""
    if setting.startswith("layer_"):
        return "layers"
    return "table10" if "position_" in setting or "llava-v1" in setting else "table3"


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
