"""Figures of section 4, ImageWikiQA: accuracy by setting, and what the errors are made of."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vlmclassifier.plotting.style import COLOURS, all_handles, bars_of, legend_below, panels, read_table, short, styled

SHOWN = ("multiple_choice", "free_answer")
CAUSES = ("recognition", "knowledge", "joining")


@styled
def table5(home: Path) -> Figure | None:
    """Accuracy of every run with its interval over different questions, and the paper's numbers."""
    table = read_table(home / "table5.csv")
    if table.empty:
        return None
    shown = table[table["value"].notna() & table["setting"].str.startswith(SHOWN)].reset_index(drop=True)
    if shown.empty:
        return None
    figure, (axis,) = panels(1, 11.0, 1.6 + 0.3 * len(shown))
    axis.errorbar(shown["value"], shown.index, xerr=bars_of(shown), fmt="o", capsize=3, label="ours")
    axis.plot(shown["paper"], shown.index, "D", color="black", markersize=4, label="the paper")
    names = shown["row"].map(short) + ", " + shown["setting"]
    axis.set(yticks=list(shown.index), yticklabels=names, xlabel="accuracy (%)", xlim=(0, 100))
    axis.invert_yaxis()
    legend_below(figure, *all_handles([axis]))
    return figure


@styled
def causes(home: Path) -> Figure | None:
    """The errors of every model by cause: the class is not recognised, the fact not known, or the two not joined."""
    file = home / "causes.csv"
    if not file.exists():
        return None
    table = pd.read_csv(file)
    figure, (axis,) = panels(1, 11.0, 1.4 + 0.4 * len(table))
    left = pd.Series(0.0, index=table.index)
    for number, cause in enumerate(CAUSES):
        axis.barh(table.index, table[cause], left=left, color=COLOURS[number], label=cause)
        left += table[cause]
    names = table["model"].map(short) + ", " + table["setting"]
    axis.set(yticks=list(table.index), yticklabels=names, xlabel="errors")
    axis.invert_yaxis()
    legend_below(figure, *all_handles([axis]))
    return figure
