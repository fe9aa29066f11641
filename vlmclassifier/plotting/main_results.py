"""Figures of section 2: accuracy of all models."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vlmclassifier.plotting.style import COLOURS, GREY, PALE, bars_of, legend_below, read_table, styled, titles_of

SETTINGS = {"open_world": "open world", "closed_world": "closed world"}


@styled
def table1(home: Path) -> Figure | None:
    """Accuracy of every model that was run, open and closed world, with the paper's numbers; None without a run."""
    table = read_table(home / "table1.csv")
    if table.empty or not table["value"].notna().any():
        return None
    table = table[table["setting"].isin(SETTINGS)]
    rows = list(dict.fromkeys(table[table["value"].notna()]["row"]))
    titles = titles_of(table[table["value"].notna()]["dataset"])
    figure, axes = plt.subplots(
        1, len(titles), figsize=(max(6.0, 4.5 * len(titles)), 1.6 + 0.42 * len(rows)), sharey=True, squeeze=False
    )
    for axis, (dataset, title) in zip(axes[0], titles.items(), strict=True):
        for number, (setting, words) in enumerate(SETTINGS.items()):
            cells = table[(table["setting"] == setting) & (table["dataset"] == dataset)].set_index("row")
            cells = cells[~cells.index.duplicated()].reindex(rows)
            places = [place + 0.2 * (2 * number - 1) for place in range(len(rows))]
            axis.barh(places, cells["value"], 0.36, xerr=bars_of(cells), color=COLOURS[number], label=words,
                      error_kw={"linewidth": 1})  # fmt: skip
            if table["paper"].notna().any():
                axis.plot(cells["paper"], places, "D", color="black", markersize=4, label="the paper", linestyle="none")
        axis.set(title=title, xlim=(0, 100), xlabel="accuracy (%)", yticks=range(len(rows)), yticklabels=rows)
        axis.grid(axis="x", color=GREY, alpha=PALE / 2)
        axis.set_axisbelow(True)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    of_label = dict(zip(labels, handles, strict=True))
    legend_below(figure, list(of_label.values()), list(of_label))
    return figure
