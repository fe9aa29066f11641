"""Figures of section 3.2: probes by position and layer, logit lens, activation patching."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlmclassifier.plotting.style import all_handles, bars_of, legend_below, looks, panels, read_table, styled

TOKENS = ("last_token", "text_behind_image", "image_token", "text_before_image", "avg_token")
LIGHT = 60  # percent from which a cell of the map is light


@styled
def positions(home: Path) -> Figure | None:
    """Table 10 as a curve: a probe on one token of the prompt. Ours is judged on held-out train images."""
    table = read_table(home / "table10.csv")
    if table.empty:
        return None
    table = table.assign(position=table["setting"].str.extract(r"^position_(-?\d+)", expand=False).astype(float))
    singles = table.dropna(subset="position")
    if not singles["value"].notna().any():
        return None
    order = sorted(singles["position"].unique(), key=lambda position: (position < 0, position))
    if not order:
        return None
    place = {position: number for number, position in enumerate(order)}
    look = looks(singles["row"])
    figure, (axis,) = panels(1, 8.0, 4.0)
    for row, rows in singles.groupby("row"):
        is_held_out = rows["setting"].str.endswith("held_out")
        ours = rows[is_held_out].dropna(subset="value").sort_values("position", key=lambda values: values.map(place))
        papers = rows[~is_held_out].dropna(subset="paper").sort_values("position", key=lambda v: v.map(place))
        if len(ours):
            axis.errorbar(ours["position"].map(place), ours["value"], bars_of(ours), label=row, **look[row])
        if len(papers):
            axis.plot(papers["position"].map(place), papers["paper"], "--", label=f"the paper, {row}", **look[row])
    axis.set_xticks(range(len(order)), [f"{position:.0f}" for position in order])
    axis.set(xlabel="position of the token (negative: from the end)", ylabel="accuracy of the probe (%)", ylim=(0, 102))
    legend_below(figure, *all_handles([axis]), most=2)
    return figure


@styled
def layer_map(home: Path) -> Figure | None:
    """Accuracy of a probe by layer (0 is what the first layer reads) and tokens, for every model and control."""
    layers = read_table(home / "layers.csv")
    if layers.empty:
        return None
    layers = layers.dropna(subset="value")
    layers[["layer", "tokens", "probe"]] = layers["setting"].str.extract(r"^layer_(\w+)\.(\w+)-?(.*)$")
    numbers = sorted({int(layer) for layer in layers["layer"].dropna() if layer.isdigit()})
    columns = [*(name for name in ("vision", "projector") if name in set(layers["layer"])), *map(str, numbers)]
    kinds = [kind for kind in TOKENS if kind in set(layers["tokens"])]
    groups = list(layers.groupby(["dataset", "probe", "row"]))
    if not groups:
        return None
    figure, axes = panels(len(groups), 4.8, 2.6, sharey=True)
    for axis, ((dataset, probe, row), found) in zip(axes, groups, strict=True):
        values = found.pivot_table(index="tokens", columns="layer", values="value").reindex(
            index=kinds, columns=columns
        )
        image = axis.imshow(values, aspect="auto", vmin=0, vmax=100)
        for (y, x), value in np.ndenumerate(values.to_numpy()):
            if value == value and len(columns) <= 12:
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="x-small",
                          color="black" if value > LIGHT else "white")  # fmt: skip
        axis.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        axis.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 6 else 0, fontsize="small")
        axis.set_title(f"{row}\n{dataset}, {probe or 'paper'} probe", fontsize="small")
    figure.supxlabel("layer", fontsize="medium")
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    return figure


def _curves(tables: pd.DataFrame, groups: list[str], line: str, ylabel: str, title: str) -> Figure:
    parts = list(tables.groupby(groups))
    look = looks(tables[line])
    figure, axes = panels(len(parts), 4.6, 3.6, sharey=True)
    for axis, (names, values) in zip(axes, parts, strict=True):
        for name, points in values.groupby(line, sort=False):
            axis.plot(points["layer"], points["accuracy"], label=name, **look[name])
            axis.fill_between(points["layer"], points["low"], points["high"], alpha=0.2, color=look[name]["color"])
        axis.set(xlabel="layer", ylim=(0, 102), xticks=sorted(values["layer"].unique()))
        axis.set_title(title.format(*names), fontsize="small")
    axes[0].set_ylabel(ylabel)
    legend_below(figure, *all_handles(axes))
    return figure


@styled
def lens(home: Path) -> Figure | None:
    """The logit lens: at which layer the right name leads, by frequency of the class."""
    files = sorted(home.glob("*/lens.csv"))
    if not files:
        return None
    tables = pd.concat([read_table(file) for file in files])
    tables["classes"] = tables["classes"] + " classes"
    return _curves(tables, ["row", "dataset"], "classes", "the right name leads (%)", "{}\n{}")


@styled
def patching(home: Path) -> Figure | None:
    """Activation patching: the share of pairs whose top name becomes the donor's, by layer and tokens."""
    files = sorted(home.glob("*/patch.csv"))
    if not files:
        return None
    tables = []
    for file in files:
        donor = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))["config"]["donor"]
        tables.append(read_table(file).assign(donor=donor).query("classes == 'all'"))
    found = pd.concat(tables)
    found["positions"] = found["positions"] + " tokens"
    return _curves(found, ["row", "dataset", "donor"], "positions", "the donor's name leads (%)",
                   "{}\n{}, donor of {} class")  # fmt: skip
