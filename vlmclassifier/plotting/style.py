"""One look for all figures: colours that colour-blind readers can tell apart, no frames, files for paper and screen."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmclassifier.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from vlmclassifier.records import UserError
from vlmclassifier.tables import label

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, no yellow
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "h")  # as many as colours and more: no pair comes twice
PALE, GREY = 0.45, "#666666"
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.titlesize": "medium", "axes.labelsize": "medium", "legend.frameon": False, "legend.fontsize": "small",
    "figure.constrained_layout.use": True, "image.cmap": "cividis", "lines.linewidth": 1.6, "lines.markersize": 5,
    "svg.fonttype": "path", "pdf.fonttype": 42, "svg.hashsalt": "vlmclassifier",
}  # fmt: skip
styled = plt.rc_context(STYLE)  # decorates every function that draws


def looks(rows: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Row -> colour and marker, which differ for any two of 77 rows."""
    return {row: {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            for number, row in enumerate(dict.fromkeys(rows))}  # fmt: skip


def read_table(file: Path, metric: str | None = "accuracy") -> pd.DataFrame:
    """A table of a section, with the column "row": model and tags. Empty where the file is absent."""
    if not file.exists():
        return pd.DataFrame()
    table = pd.read_csv(file, dtype={"tags": str}).fillna({"tags": ""})
    if metric is not None and "metric" in table:
        table = table[table["metric"] == metric]
    if {"model", "tags"} <= set(table):
        table = table.assign(row=[label(str(row.model), row.tags) for row in table.itertuples()])
    return table


def our_accuracies(file: Path) -> pd.DataFrame:
    """The accuracies in a section's table that were run here, for a notebook. Raises UserError before there are any."""
    if not file.exists():
        raise UserError(f"{file} does not exist yet: run python {file.parent.name}/table.py first.")
    table = read_table(file)
    columns = ["model", "tags", "setting", "dataset", "value", "low", "high", "n", "paper", "inside"]
    return table[table["value"].notna()][columns].round(1)


def titles_of(datasets: Iterable[str]) -> dict[str, str]:
    """Dataset -> its title; the paper's first, in its order."""
    found = set(datasets)
    order = [*(key for key in PAPER_BENCHMARKS if key in found), *sorted(found - set(PAPER_BENCHMARKS))]
    return {key: BENCHMARKS[key].title if key in BENCHMARKS else key for key in order}


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the data sets that we have numbers of; where we have none at all, every row (the paper's)."""
    ours = set(table[table["value"].notna()]["dataset"])
    return table[table["dataset"].isin(ours)] if ours else table


def short(model: str) -> str:
    """A model without its tags, except for what it was fine-tuned on."""
    name, _, tags = model.partition(" (")
    trained = [tag for tag in tags.rstrip(")").split(", ") if tag.startswith(("fine-tuned: ", "untrained: "))]
    return ", ".join([name, *(tag.removeprefix("fine-tuned: ") for tag in trained)])


def panels(count: int, width: float = 4.4, height: float = 3.4, **more: Any) -> tuple[Figure, Sequence[Axes]]:
    """A figure with some axes, at most four in a row; those left over are hidden."""
    columns = min(4, max(1, count))
    rows = -(-max(1, count) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **more)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def bars_of(rows: pd.DataFrame) -> list[pd.Series]:
    """The lengths of the error bars below and above."""
    return [(rows["value"] - rows["low"]).clip(lower=0), (rows["high"] - rows["value"]).clip(lower=0)]


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], most: int = 4) -> None:
    """One legend below all axes, off the curves; `most`: entries in one line."""
    longest = max((len(text) for text in labels), default=1)
    width = figure.get_size_inches()[0]
    columns = max(1, min(most, len(labels), int(width * 11 // (longest + 6))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def all_handles(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """The legend entries of several axes, each once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(text, handle)
    return list(found.values()), list(found)


def save(figure: Figure | None, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.pdf; without a figure say so."""
    if figure is None:
        print(f"{name}: nothing to draw yet; run this section's launchers, then python {folder.name}/table.py")
    else:
        figure.savefig(folder / f"{name}.png", dpi=200)
        figure.savefig(folder / f"{name}.pdf")


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, closed."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = stream.getvalue()
    return text[text.index("<svg") :]
