"""Figures of section 3.3: accuracy by class frequency, the null of its coefficients, the dose-response curve."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlmclassifier.plotting.style import (
    COLOURS,
    GREY,
    all_handles,
    bars_of,
    legend_below,
    looks,
    panels,
    read_table,
    styled,
)


def _runs(home: Path) -> dict[Path, str]:
    """Folder of correlate.py -> its title."""
    found = {}
    for file in sorted(home.glob("*/correlations.csv")):
        table = read_table(file, None)
        if len(table):
            first = table.iloc[0]
            found[file.parent] = f"{first['row']}\n{first['setting']}, {first['dataset']}"
    return found


@styled
def by_count(home: Path) -> Figure | None:
    """Figures 3 and 7: accuracy by the number of sentences that name the class; bins inflate a correlation."""
    runs = _runs(home)
    if not runs:
        return None
    figure, axes = panels(len(runs), 5.2, 3.6, sharey=True)
    for axis, (folder, title) in zip(axes, runs.items(), strict=True):
        bins = pd.read_csv(folder / "bins.csv")
        edges, look = sorted(bins["low"].unique()), looks(bins["source"])
        for source, rows in bins[bins["classes"] > 0].groupby("source", sort=False):
            places = [edges.index(low) for low in rows["low"]]
            axis.plot(places, rows["accuracy"], label=source, **look[source])
        totals = bins[bins["source"] == list(look)[-1]]
        for low, count in zip(totals["low"], totals["classes"], strict=True):
            axis.annotate(f"{count:.0f}", (edges.index(low), 104), ha="center", fontsize="x-small", color=GREY)
        axis.set_xticks(range(len(edges)), [f"{low:g}" for low in edges], rotation=60, fontsize="small")
        axis.set(xlabel=f"sentences that name the class, from\n(grey: classes, {list(look)[-1]})", ylim=(-3, 110))
        axis.set_title(title, fontsize="small")
    axes[0].set_ylabel("accuracy (%)")
    legend_below(figure, *all_handles(axes))
    return figure


@styled
def by_class(home: Path) -> Figure | None:
    """Every class as a point: accuracy against its count, with Spearman's coefficient and that of shuffled classes."""
    runs = _runs(home)
    if not runs:
        return None
    figure, axes = panels(len(runs), 4.6, 3.6, sharey=True)
    for axis, (folder, title) in zip(axes, runs.items(), strict=True):
        found = pd.read_csv(folder / "correlations.csv").query("classes == 'all' and statistic == 'spearman'")
        row, classes = found.iloc[-1], pd.read_csv(folder / "classes.csv")
        jitter = np.random.default_rng(0).normal(scale=0.01, size=len(classes))
        axis.scatter(np.log10(1 + classes[row["source"]]) + jitter, classes["accuracy"], s=12, alpha=0.6)
        text = f"Spearman {row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        null = f"shuffled {row['null_low']:.2f} to {row['null_high']:.2f}"
        axis.set_title(f"{title}\n{text}; {null}", fontsize="small")
        axis.set(xlabel=f"log10(1 + count), {row['source']}", ylim=(-3, 103))
    axes[0].set_ylabel("accuracy (%)")
    return figure


@styled
def null(home: Path) -> Figure | None:
    """Coefficients with 95% intervals beside the middle 95% of shuffled classes; those of bins have the widest null."""
    runs = _runs(home)
    if not runs:
        return None
    figure, axes = panels(len(runs), 5.0, 3.2, sharex=True)
    for axis, (folder, title) in zip(axes, runs.items(), strict=True):
        rows = pd.read_csv(folder / "correlations.csv").query("classes == 'all'")
        rows = rows[rows["source"] == rows["source"].iloc[-1]]
        places = np.arange(len(rows))
        axis.barh(places, rows["null_high"] - rows["null_low"], left=rows["null_low"], color="lightgrey",
                  label="shuffled classes")  # fmt: skip
        reach = np.abs(rows[["low", "high"]].to_numpy().T - rows["value"].to_numpy())
        axis.errorbar(rows["value"], places, xerr=reach, fmt="o", color=COLOURS[0], label="ours")
        axis.set_yticks(places, [text.replace("_", " ") for text in rows["statistic"]], fontsize="small")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(xlabel=f"coefficient, {rows['source'].iloc[-1]}", xlim=(-1.05, 1.05))
        axis.set_title(title, fontsize="small")
    legend_below(figure, *all_handles(axes))
    return figure


@styled
def dose_response(home: Path) -> Figure | None:
    """Accuracy against the number of texts that name a class, for designed frequencies (intervene.py)."""
    file = home / "intervention" / "curve.csv"
    if not file.exists():
        return None
    curve = pd.read_csv(file)
    scores, look = list(dict.fromkeys(curve["score"])), looks(curve["arm"])
    figure, axes = panels(len(scores), 4.8, 3.6, sharey=True)
    for axis, score in zip(axes, scores, strict=True):
        for arm, rows in curve[curve["score"] == score].groupby("arm", sort=False):
            rows = rows.sort_values("texts")
            axis.errorbar(rows["texts"], rows["accuracy"], bars_of(rows.assign(value=rows["accuracy"])), label=arm,
                          capsize=2, **look[arm])  # fmt: skip
        axis.set(title=score, xlabel="texts that name the class", xscale="symlog", ylim=(-2, 102))
        axis.set_xlim(left=-0.3)
    axes[0].set_ylabel("accuracy (%)")
    legend_below(figure, *all_handles(axes))
    return figure
