"""Figures of section 3.1: candidates, guidance, and the probabilities of a ranking."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.plotting.style import (
    COLOURS,
    GREY,
    PALE,
    all_handles,
    bars_of,
    legend_below,
    looks,
    measured,
    panels,
    read_table,
    styled,
    titles_of,
)
from vlmclassifier.scoring.statistics import ratio_of_errors

TOKENS = r"(, )?\b\d+ tokens"  # a tag
PAPERS = PROJECT_ROOT / "inference_analysis" / "paper.csv"
PAPERS_N = 1_000  # images behind a number of the paper
KINDS = [plt.Line2D([], [], color=GREY, marker="o"), plt.Line2D([], [], color=GREY, linestyle="--", marker=".")]


def _sizes(home: Path) -> pd.DataFrame:
    sizes = read_table(home / "table9.csv")
    if sizes.empty:
        return sizes
    sizes = measured(sizes[sizes["setting"].str.fullmatch(r"\d+_classes")])
    return sizes.assign(K=sizes["setting"].str.extract(r"(\d+)", expand=False).astype(int))


def _k_axis(axis: Axes, sizes: pd.DataFrame) -> None:
    counts = sorted(set(sizes["K"]))
    axis.set(xscale="log", xlabel="candidates K", xlim=(0.85 * counts[0], 1.2 * counts[-1]))
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()


@styled
def figure2(home: Path) -> Figure | None:
    """Figure 2: accuracy against the number of candidates K, with the paper's curves dashed."""
    sizes = _sizes(home)
    if sizes.empty:
        return None
    look, titles = looks(sizes["row"]), titles_of(sizes["dataset"])
    figure, axes = panels(len(titles), sharey=True)
    for axis, (dataset, title) in zip(axes, titles.items(), strict=True):
        for row, cells in sizes[sizes["dataset"] == dataset].sort_values("K").groupby("row"):
            axis.plot(cells["K"], cells["paper"], "--", color=look[row]["color"], marker=".", alpha=PALE + 0.2)
            ours = cells.dropna(subset="value")
            axis.errorbar(ours["K"], ours["value"], bars_of(ours), **look[row])
        axis.set(title=title, ylim=(0, 102))
        _k_axis(axis, sizes)
    axes[0].set_ylabel("accuracy (%)")
    handles = [plt.Line2D([], [], **look[row]) for row in look]
    legend_below(figure, [*handles, *KINDS], [*look, "ours", "the paper"])
    return figure


@styled
def figure4(home: Path) -> Figure | None:
    """Figure 4: errors of a VLM per error of CLIP; a miniature VLM is divided by the miniature CLIP."""
    sizes = _sizes(home)
    if sizes.empty:
        return None
    look, titles = looks(sizes["row"]), titles_of(sizes["dataset"])
    figure, axes = panels(len(titles), sharey=True)
    drawn: set[str] = set()
    for axis, (dataset, title) in zip(axes, titles.items(), strict=True):
        cells = sizes[sizes["dataset"] == dataset]
        comparable = cells["tags"].str.replace(TOKENS, "", regex=True)  # CLIP's runs have no limit of tokens
        for source, line in (("value", "-"), ("paper", "--")):
            for _, alike in cells.groupby(comparable):
                n = alike["n"] if source == "value" else PAPERS_N
                counted = alike.assign(errors=(100 - alike[source]) / 100 * n)
                errors = counted.pivot_table(index="K", columns="row", values="errors", dropna=False)
                errors = errors.dropna(axis=1, how="all")
                clips = [row for row in errors if "clip" in row.lower()]
                for row in [row for row in errors if row not in clips]:
                    for clip in clips:
                        ratio = ratio_of_errors(errors[row], errors[clip])
                        alpha = 1.0 if line == "-" else PALE + 0.2
                        axis.plot(ratio.index, ratio, line, alpha=alpha, **look[row])
                        drawn.add(row)
        axis.axhline(1, color=GREY, linewidth=0.8)
        axis.set(title=title, yscale="log")
        _k_axis(axis, sizes)
    axes[0].set_ylabel("errors of the VLM per error of CLIP")
    rows = [row for row in look if row in drawn]
    legend_below(figure, [*(plt.Line2D([], [], **look[row]) for row in rows), *KINDS], [*rows, "ours", "the paper"])
    return figure


@styled
def figure6(home: Path, papers: Path = PAPERS) -> Figure | None:
    """Figure 6: accuracy against t of the guidance. `papers`: paper.csv, whose best accuracies are dotted lines."""
    guidance = read_table(home / "guidance.csv")
    if guidance.empty:
        return None
    guidance = guidance[~guidance["tags"].str.contains("split train")]
    best = pd.read_csv(papers).query("setting == 'prob_avg_cfg'")
    titles = titles_of(guidance["dataset"])
    lines = [
        f"{row}, {score}, prior: {prior.replace('_', ' ')}"
        for row, score, prior in guidance[["row", "score", "prior"]].drop_duplicates().itertuples(index=False)
    ]
    look = looks(lines)
    figure, axes = panels(len(titles), 5.5, 3.8, sharey=True)
    for axis, (dataset, title) in zip(axes, titles.items(), strict=True):
        for (row, score, prior), line in guidance[guidance["dataset"] == dataset].groupby(["row", "score", "prior"]):
            text = f"{row}, {score}, prior: {prior.replace('_', ' ')}"
            axis.plot(line["t"], line["accuracy"], "-" if prior == "no_image" else "--", color=look[text]["color"],
                      marker=look[text]["marker"], markevery=4, label=text)  # fmt: skip
        models = set(guidance[guidance["dataset"] == dataset]["model"])
        if len(best):
            for row in best[best["model"].isin(models) & (best["dataset"] == dataset)].itertuples():
                axis.axhline(row.value, linestyle=":", color=GREY, label=f"the paper's best, {row.model}")
        axis.axvline(1, color=GREY, linewidth=0.8)
        axis.set(title=title, xlabel="t (1: no guidance)")
    axes[0].set_ylabel("top-1 accuracy (%)")
    legend_below(figure, *all_handles(axes), most=2)
    return figure


@styled
def reliability(home: Path) -> Figure | None:
    """Accuracy by confidence of every run, before and after the temperature; bars are the images per bin."""
    bins = read_table(home / "calibration" / "reliability.csv", None)
    if bins.empty:
        return None
    errors = read_table(home / "calibration" / "calibration.csv", None).set_index("run")
    runs = list(dict.fromkeys(bins["run"]))
    figure, axes = panels(len(runs), 4.2, 4.0, sharey=True)
    for axis, run in zip(axes, runs, strict=True):
        of_run = bins[bins["run"] == run]
        for number, (when, rows) in enumerate(of_run.groupby("temperature", sort=False)):
            rows = rows.sort_values("confidence")
            text = f"{when} (ECE {errors.loc[run, f'ece_{when}']:.1f}%)"
            axis.plot(100 * rows["confidence"], 100 * rows["accuracy"], marker="os"[number], label=text,
                      color=COLOURS[number])  # fmt: skip
            share = 100 * rows["n"] / of_run["n"].groupby(of_run["temperature"]).sum().max()
            axis.bar(100 * (rows["low"] + rows["high"]) / 2, share, 6 - 2 * number, color=COLOURS[number], alpha=0.25)
        axis.plot([0, 100], [0, 100], color=GREY, linewidth=0.8)
        first = of_run.iloc[0]
        title = f"{first['row']}\n{first['setting']}, {first['dataset']}, T = {errors.loc[run, 'temperature']:.2f}"
        axis.set(title=title, xlabel="confidence (%)", xlim=(0, 100), ylim=(0, 102))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes[0].set_ylabel("accuracy (%)")
    return figure


@styled
def coverage(home: Path) -> Figure | None:
    """Accuracy on the most confident images against their share, one line per run."""
    curve = read_table(home / "calibration" / "coverage.csv", None)
    if curve.empty:
        return None
    titles = titles_of(curve["dataset"])
    lines = dict.fromkeys(f"{row}, {setting}" for row, setting in zip(curve["row"], curve["setting"], strict=True))
    look = looks(lines)
    figure, axes = panels(len(titles), 6.0, 3.6, sharey=True)
    for axis, (dataset, title) in zip(axes, titles.items(), strict=True):
        for (row, setting, _), rows in curve[curve["dataset"] == dataset].groupby(["row", "setting", "run"]):
            text = f"{row}, {setting}"
            axis.plot(100 * rows["coverage"], 100 * rows["accuracy"], color=look[text]["color"], label=text)
        axis.axhline(90, color=GREY, linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="answered (%), the most confident first", xlim=(0, 100), ylim=(0, 102))
    axes[0].set_ylabel("accuracy of the answers (%)")
    legend_below(figure, *all_handles(axes), most=2)
    return figure


@styled
def hierarchy(home: Path) -> Figure | None:
    """The deepest name in the tree with a given certainty: how often it is right, and how many classes it covers."""
    rows = read_table(home / "calibration" / "hierarchy.csv", None)
    if rows.empty:
        return None
    lines = rows.assign(line=rows["row"] + ", " + rows["setting"] + ", " + rows["dataset"])
    look = looks(lines["line"])
    figure, axes = panels(2, 4.6, 3.4)
    for text, line in lines.groupby("line", sort=False):
        axes[0].plot(line["certainty"], line["accuracy"], label=text, **look[text])
        axes[1].plot(line["certainty"], line["classes"], **look[text])
    axes[0].plot([45, 100], [45, 100], color=GREY, linewidth=0.8)
    axes[0].set(xlabel="certainty asked for (%)", ylabel="the name is right (%)", ylim=(40, 102))
    axes[1].set(xlabel="certainty asked for (%)", ylabel="classes below the name, mean", yscale="log")
    legend_below(figure, *all_handles(axes), most=2)
    return figure
