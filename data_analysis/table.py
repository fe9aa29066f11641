"""Print Table 11 and Appendix B.6 from whatever correlations exist: ours beside the paper's numbers.

    python data_analysis/table.py
    python data_analysis/table.py --outputs outputs/data_analysis --format latex

Reads the correlations.csv of correlate.py, in the folders of --outputs. Writes table11 (.md, .csv, .tex) beside them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import UserError
from vlmclassifier.tables import label, markdown, only_run

if TYPE_CHECKING:
    from collections.abc import Collection

    from pandas import DataFrame, Series

PAPER = Path(__file__).parent / "paper.csv"
TABLES = ("table11", "appendix_b6")
STAGES = {"total": "pretrain_and_instruct"}  # our name of a source -> the paper's setting; the others are the same
# Runs that the paper's rows are about.
PAPERS_SETTINGS = ("open_world", "closed_world", "linear", "last_token", "open_world-held_out", "open_world-last_epoch")
FINE_TUNED = "{} Fine-tuned on ImageNet"  # what the paper prints in all columns, whatever the data set was
ENDS = {"best": "held_out", "last": "last_epoch"}  # folder of the weights -> how their epoch was chosen
PAPERS_COUNTS = ("default", "reference_rules")  # rules of counting that the paper's rows are compared with
KEYS = ["model", "dataset", "source", "statistic"]
LEGEND = """Coefficients over classes: ours [95% bootstrap interval] (the paper's). spearman and pearson are of the
counts, as in the paper; pearson_log is of log10(1 + count). p: share of shuffled classes with a Spearman coefficient as
far from 0. counts: the rules of count_classes.py, or the file of other counts. Rows with tags in parentheses and other
counts than default and reference_rules are not compared with the paper. Fine-tuned on ImageNet: the paper's name for
the projector fine-tuned on the data set itself; ours may have a tenth of the train rows held out."""


@dataclass
class Args:
    outputs: Path = OUTPUTS / "data_analysis"
    """Folder of the folders of correlate.py."""
    all: bool = False
    """Also show the rows of the paper that were not run."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    """Collect, compare with the paper, write and print."""
    import pandas as pd

    files = sorted(args.outputs.glob("*/correlations.csv"))
    if not files:
        raise UserError(f"No correlations in {args.outputs}: start with data_analysis/correlate.py.")
    ours = pd.concat([pd.read_csv(file, dtype={"tags": str}).fillna({"tags": ""}) for file in files])
    if missing := {"counts", "tags", "classes"} - set(ours):
        raise UserError(f"{files[0]} has no column {min(missing)}: run data_analysis/correlate.py again.")
    joined = compare(ours[ours["classes"] == "all"])
    wide = only_run(wide_table(joined), args.all)
    written = [args.outputs / f"table11.{suffix}" for suffix in ("md", "csv", "tex")]
    ends = figure3()
    written[0].write_text(f"{markdown(wide)}\n\n{ends}\n\n{LEGEND}\n", encoding="utf-8")
    joined.to_csv(written[1], index=False)
    written[2].write_text(wide.to_latex(index=False, escape=True), encoding="utf-8")
    if args.format == "markdown":
        title = "Table 11 and Appendix B.6: frequency against accuracy over classes"
        print(f"{title}\n\n{markdown(wide)}\n\n{ends}\n\n{LEGEND}")
        print("Written: " + ", ".join(str(file) for file in written))
    else:
        print(written[("csv", "latex").index(args.format) + 1].read_text(encoding="utf-8"))


def figure3() -> str:
    """The paper's accuracies at the ends of Figure 3, which its text names; ours are bins.csv of correlate.py."""
    import pandas as pd

    papers = pd.read_csv(PAPER)
    rows = papers[papers["table"] == "figure3"]
    ends = "; ".join(f"{row.model}, {row.setting} on {row.dataset}: {row.value:g}" for row in rows.itertuples())
    return f"Figure 3, accuracy of the classes at its ends (paper; ours: bins.csv of every run): {ends}."


def compare(ours: "DataFrame") -> "DataFrame":
    """Our coefficients with the paper's beside them where a run has no tags; rows of the paper alone stay visible."""
    import pandas as pd

    papers = pd.read_csv(PAPER)
    papers = papers[papers["table"].isin(TABLES)].rename(columns={"setting": "source", "metric": "statistic"})
    papers = papers.rename(columns={"value": "paper"}).drop(columns="table")
    ours = ours.assign(source=ours["source"].replace(STAGES)).apply(
        as_the_papers_row, axis=1, models=set(papers["model"])
    )
    joined = ours.merge(papers, how="left", on=KEYS)
    is_compared = (joined["tags"] == "") & joined["setting"].isin(PAPERS_SETTINGS)
    is_compared &= joined["counts"].isin(PAPERS_COUNTS)
    joined.loc[~is_compared, "paper"] = None
    known = set(joined.loc[joined["paper"].notna(), KEYS].itertuples(index=False, name=None))
    missing = [row not in known for row in papers[KEYS].itertuples(index=False, name=None)]
    return pd.concat([joined, papers[missing].assign(tags="", setting="", counts="")], ignore_index=True)


def as_the_papers_row(row: "Series", models: "Collection[str]") -> "Series":
    """A projector fine-tuned as in the paper on the data set itself under the paper's name; other rows as they are.

    The setting then says how its epoch was chosen. `models`: those of the paper.
    """
    for folder, end in ENDS.items():
        name = FINE_TUNED.format(row["model"])
        if row["tags"] == f"fine-tuned: projector on {row['dataset']}, {folder}" and name in models:
            row = row.copy()
            row["model"], row["setting"], row["tags"] = name, f"{row['setting']}-{end}", ""
            break
    return row


def wide_table(joined: "DataFrame") -> "DataFrame":
    """One row per model, setting, data set, counts and source; one column per coefficient, and the p of Spearman's."""
    import pandas as pd

    names = ("spearman", "pearson", "pearson_log", "spearman_given_reference")
    rows: dict[tuple, dict[str, str]] = {}
    for row in joined.itertuples():
        if row.statistic not in names:
            continue
        cells = rows.setdefault((label(row.model, row.tags), row.setting, row.dataset, row.counts, row.source), {})
        paper = "" if row.paper != row.paper else f" ({row.paper:.2f})"
        if row.value != row.value:
            cells[row.statistic] = f"{'not defined' if row.counts else 'missing'}{paper}"  # ours: nothing varies
            continue
        cells[row.statistic] = f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]{paper}"
        if row.statistic == "spearman":
            cells |= {"classes": f"{row.n:.0f}", "p": f"{row.p:.4f}"}
    columns = ["classes", *names, "p"]
    body = [[*key, *(cells.get(column, "") for column in columns)] for key, cells in sorted(rows.items())]
    return pd.DataFrame(body, columns=["model", "setting", "dataset", "counts", "source", *columns])


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
