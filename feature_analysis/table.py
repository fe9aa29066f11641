"""Print Table 3 (left), Table 10, the layer map and the few-shot classifiers: ours beside the paper's numbers.

    python feature_analysis/table.py
    python feature_analysis/table.py --outputs outputs/feature_analysis --format latex

Reads the runs of probe.py and of locate.py heads. Writes table3, table10 and, where there are such runs, few_shot and
layers (.md, .csv in the long form with every metric, .tex) beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import Score, UserError
from vlmclassifier.scoring.runs import collect_runs
from vlmclassifier.tables import LEGEND, compare, label, markdown, only_run, summary, wide_table, write_tables

if TYPE_CHECKING:
    from pandas import DataFrame

PAPER = Path(__file__).parent / "paper.csv"
TITLES = {
    "table3": "Table 3, left: probes", "table10": "Table 10: probes on single tokens",
    "few_shot": "Few images of every class", "layers": "The layer map: probes on every layer, by tokens",
}  # fmt: skip
LAYER = r"^layer_(?P<layer>\w+)\.(?P<tokens>\w+)-?(?P<probe>.*)$"  # the setting of a probe on one layer
TOKENS = ("last_token", "text_behind_image", "image_token", "text_before_image", "avg_token")
RULES = """A probe of the paper is judged by the paper's rule: the epoch that is best on the test images. Rows that end
in held_out choose it on held-out train images and are our numbers; last_epoch chooses nothing. Rows "untrained: ..."
are controls: what a probe finds behind a language model that has learnt nothing."""


@dataclass
class Args:
    outputs: Path = OUTPUTS / "feature_analysis"
    """Folder of the runs of probe.py."""
    all: bool = False
    """Also show the rows of the paper that were not run."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


AVERAGE = "avg_token-llava-v1"  # of the prompt that Table 10's positions are in: its "average"


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
    for name, title in TITLES.items():
        scores = [score for score in collected.scores if name in tables_of(score.setting)]
        if name == "table10":
            scores = [replace(score, setting=score.setting.replace(AVERAGE, "position_average")) for score in scores]
        published = papers[papers["table"] == name]
        if not scores and not len(published):
            continue
        comparison = compare(scores, PAPER, name)
        if name == "layers":
            wide = layer_map(comparison)
        else:
            settings = [*published["setting"].unique()]
            datasets = list(PAPER_BENCHMARKS) if len(published) else []
            wide = only_run(wide_table(comparison, datasets, [*published["model"].unique()], (), settings), args.all)
        files += write_tables(wide, comparison, args.outputs, name)
        if args.format == "markdown":
            print(f"{title}, accuracy in percent\n\n{markdown(wide)}\n\n{summary(comparison)}\n")
        else:
            print(files[("csv", "latex").index(args.format) - 2].read_text(encoding="utf-8"))
    if args.format == "markdown":
        print(f"{RULES}\n\n{LEGEND}")
        for note in [*collected.notes, *template_notes(collected.scores, papers)]:
            print(f"Note: {note}")
        print("Written: " + ", ".join(str(file) for file in files))


def tables_of(setting: str) -> tuple[str, ...]:
    """The tables that show a probe: Table 10 has single tokens, and the mean of the prompt that they are from."""
    if setting.startswith("layer_"):
        return ("layers",)
    if "_shots" in setting:
        return ("few_shot",)
    if setting.startswith("position_"):
        return ("table10",)
    return ("table3", "table10") if setting.startswith(AVERAGE) else ("table3",)


def layer_map(comparison: "DataFrame") -> "DataFrame":
    """One row per model, data set, probe and kind of tokens, one column per layer; the vision encoder first."""
    import pandas as pd

    rows = comparison[comparison["metric"] == "accuracy"]
    rows = rows.assign(model=[label(row.model, row.tags) for row in rows.itertuples()])
    rows = pd.concat([rows.reset_index(drop=True), rows["setting"].str.extract(LAYER).reset_index(drop=True)], axis=1)
    table = rows.pivot_table(index=["model", "dataset", "probe", "tokens"], columns="layer", values="value")
    first = [name for name in ("vision", "projector") if name in table]
    table = table[first + sorted(set(table.columns) - set(first), key=int)]
    order = {tokens: place for place, tokens in enumerate(TOKENS)}
    table = table.sort_index(key=lambda values: values.map(order) if values.name == "tokens" else values)
    return table.reset_index().rename_axis(columns=None)


def template_notes(scores: Sequence[Score], papers: "DataFrame") -> list[str]:
    """For every cell of Table 3 that was run with two prompt templates: which of them matches the paper's number."""
    notes = []
    for row in papers[papers["table"] == "table3"].itertuples():
        found = {}
        for score in scores:
            key = (score.model, score.dataset, score.metric)
            if key == (row.model, row.dataset, row.metric) and not score.tags:
                if score.setting == row.setting:
                    found["the model's own template"] = score
                elif score.setting == f"{row.setting}-llava-v1":
                    found["llava-v1"] = score
        if len(found) < 2:
            continue
        inside = [name for name, score in found.items() if score.low <= row.value <= score.high]
        nearest = min(found, key=lambda name: abs(found[name].value - row.value))
        numbers = ", ".join(f"{name} {score.value:.1f} [{score.low:.1f}, {score.high:.1f}]" for name, score in
                            found.items())  # fmt: skip
        verdict = "both match" if len(inside) == 2 else f"{inside[0]} matches" if inside else f"{nearest} is nearer"
        notes.append(f"{row.model}, {row.setting}, {row.dataset}, the paper's {row.value:.1f}: {numbers}: {verdict}.")
    return notes


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
