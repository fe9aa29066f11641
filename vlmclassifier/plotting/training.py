"""Figures of sections 3.2 and 4: loss and spikes, accuracy by epoch, the forgetting grid."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlmclassifier.plotting.style import all_handles, legend_below, looks, panels, styled

SMOOTHED = 5  # steps
LIGHT = 60  # percent from which a cell of the grid is light


@styled
def loss(home: Path) -> Figure | None:
    """Figure 5: the loss of every training, its spikes as crosses, and the norm of its gradient."""
    trainings = sorted(file.parent for file in home.glob("*/loss.csv"))
    if not trainings:
        return None
    look = looks(folder.name for folder in trainings)
    figure, axes = panels(2, 5.5, 3.6)
    for folder in trainings:
        steps, colour = pd.read_csv(folder / "loss.csv", dtype={"rows": str}), look[folder.name]["color"]
        line = "-" if list(look).index(folder.name) < 7 else "--"
        smooth = steps["loss"].rolling(SMOOTHED, min_periods=1).mean()
        axes[0].plot(steps["step"], smooth, line, color=colour, label=folder.name)
        spikes = steps[steps["spike"] == 1]
        axes[0].plot(spikes["step"], spikes["loss"], "x", color=colour)
        axes[1].plot(steps["step"], steps["gradient_norm"], line, color=colour, linewidth=0.9)
    axes[0].set(xlabel="step", ylabel=f"loss per token, mean of {SMOOTHED} steps", yscale="log")
    axes[1].set(xlabel="step", ylabel="gradient norm", yscale="log")
    legend_below(figure, *all_handles(axes[:1]))
    return figure


@styled
def epochs(home: Path) -> Figure | None:
    """Accuracy by epoch on held-out train images, which choose the epoch, and on test images where answered."""
    files = sorted(home.glob("*/epochs.csv"))
    if not files:
        return None
    look = looks(file.parent.name for file in files)
    figure, (axis,) = panels(1, 8.0, 3.6)
    for file in files:
        table = pd.read_csv(file)
        for column, line in (("held_out", "-"), ("test", "--")):
            if column in table:
                text = f"{file.parent.name}, {column.replace('_', ' ')}"
                axis.plot(table["epoch"], table[column], line, label=text, **look[file.parent.name])
    axis.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102))
    axis.set_xticks(sorted({int(tick) for tick in axis.get_xticks() if tick >= 1}))
    legend_below(figure, *all_handles([axis]))
    return figure


@styled
def forgetting(home: Path) -> Figure | None:
    """The forgetting grid: right answers, and answers that are a class name, by fine-tuning, questions and images."""
    files = sorted(home.glob("forgetting*/forgetting.csv"))
    if not files:
        return None
    parts = [
        (file.parent.name, column, words)
        for file in files
        for column, words in (("right", "right answers"), ("class_names", "answers that are a class name"))
    ]
    tables = {}
    for name, column, words in parts:
        grid = pd.read_csv(home / name / "forgetting.csv")
        grid["cell"] = grid["questions"] + " questions,\n" + grid["images"] + " images"
        found = grid.pivot_table(index="model", columns="cell", values=column, sort=False)
        if not found.empty:
            tables[f"{name}: {words}"] = found
    if not tables:
        return None
    height = 1.6 + 0.34 * max(len(table) for table in tables.values())
    figure, axes = panels(len(tables), 5.6, height, sharey=True)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        image = axis.imshow(table, aspect="auto", vmin=0, vmax=100)
        for (y, x), value in np.ndenumerate(table.to_numpy()):
            if value == value:
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="x-small",
                          color="black" if value > LIGHT else "white")  # fmt: skip
        axis.set_yticks(range(len(table)), table.index, fontsize="small")
        axis.set_xticks(range(table.shape[1]), table.columns, rotation=60, fontsize="x-small")
        axis.set_title(title, fontsize="small")
    figure.colorbar(image, ax=axes, label="%")
    return figure
