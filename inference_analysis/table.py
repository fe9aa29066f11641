"""Print Tables 2, 9 and 12 from whatever runs exist: ours beside the paper's numbers.

    python inference_analysis/table.py
    python inference_analysis/table.py --outputs outputs --format latex

Reads the runs of main_results/classify_*.py and of rank_labels.py. Writes table2, table9 and table12 (.md, .csv in the
long form with every metric, .tex) and guidance.csv (accuracy by t, for Figure 6) into outputs/inference_analysis.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import Score, UserError
from vlmclassifier.scoring.runs import CLASSIFY_KINDS, Cell, ScoredRun, collect_runs
from vlmclassifier.tables import (
    LEGEND,
    compare,
    label,
    markdown,
    metric_table,
    only_run,
    summary,
    wide_table,
    write_tables,
)

if TYPE_CHECKING:
    from pandas import DataFrame

PAPER = Path(__file__).parent / "paper.csv"
# The paper's names of our settings, table by table.
PROMPTS = {
    "base_prompt": "open_world", "prompt_alternative_1": "open_world-prompt_alternative_1",
    "prompt_alternative_2": "open_world-prompt_alternative_2",
    "prompt_alternative_3": "open_world-prompt_alternative_3",
    "label_fixed_order": "closed_world-label_fixed_order", "label_random_order": "closed_world",
    "label_random_order_cot": "closed_world-cot",
}  # fmt: skip
SIZES = {f"{count}_classes": f"{count}_classes" for count in (2, 5, 20, 100)} | {"all_classes": "closed_world"}
RANKED = [
    f"{score}{guidance}"
    for guidance in ("", "_cfg", "_cfg_held_out", "_cfg_mean_prior", "_cfg_mean_prior_held_out")
    for score in ("prob_sum", "prob_avg")
]
GUIDANCE = """Guidance: t * log p(name | image, prompt) + (1 - t) * log p(name | prompt). "cfg" takes the whole t from 0
to 8 that is best on the evaluated images, as the paper does; its row prob_avg_cfg is the one that is compared with
the paper's, which is called "Avg" while the reference code sums: prob_sum_cfg is given beside it. "mean_prior": the
prior is the mean over the evaluated images, as in the reference code, instead of the prompt without the image.
"held_out": t is chosen on the train split where it has been ranked, else for each half of the images on the other
half: these are our numbers."""
START = "start with inference_analysis/rank_labels.sh, prompts.sh or label_set_size.sh"


@dataclass(frozen=True)
class Table:
    """Which runs a table shows, and what the paper calls their settings."""

    settings: dict[str, str]  # the paper's name -> ours
    kinds: tuple[str, ...]
    ranked: bool = False  # whether rankings belong to it


TABLES = {
    "table2": Table(PROMPTS | {"direct_generation": "open_world"}, ("vlm",), ranked=True),
    "table9": Table(SIZES, CLASSIFY_KINDS),
    "table12": Table(PROMPTS, ("api",)),
}


@dataclass
class Args:
    outputs: Path = OUTPUTS
    """Folder that holds main_results and inference_analysis."""
    all: bool = False
    """Also show the rows of the paper that were not run."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    """Collect, rename the settings, print."""
    import pandas as pd

    # ---- collect
    if not args.outputs.is_dir():
        raise UserError(f"The folder {args.outputs} does not exist, so there are no runs: {START}.")
    home, answers = args.outputs / "inference_analysis", args.outputs / "main_results"
    of_kind = {kind: collect_runs([answers], [kind]) for kind in CLASSIFY_KINDS}
    ranked = collect_runs([home], ["ranking"])
    notes = dict.fromkeys(note for runs in (*of_kind.values(), ranked) for note in runs.notes)

    # ---- one table after the other
    papers = pd.read_csv(PAPER)
    files = [write_guidance(home, ranked.runs)]
    shown = 0
    for name, table in TABLES.items():
        scores, not_applicable = [], set()
        for kind in table.kinds:
            scores += renamed(of_kind[kind].scores, table)
            not_applicable |= renamed_cells(of_kind[kind].not_applicable, table)
        if table.ranked:
            scores += ranked.scores
            not_applicable |= ranked.not_applicable
        comparison = compare(scores, PAPER, name)
        models = list(papers[papers["table"] == name]["model"].unique())
        order = [*table.settings, *RANKED]
        wide = only_run(wide_table(comparison, list(PAPER_BENCHMARKS), models, not_applicable, order), args.all)
        files += write_tables(wide, comparison, home, name)
        shown += len(scores)
        if args.format != "markdown":
            print(files[("csv", "latex").index(args.format) - 2].read_text(encoding="utf-8"))
            continue
        print(f"Table {name.removeprefix('table')}: accuracy in percent\n\n{markdown(wide)}\n\n"
              f"{summary(comparison)}\n")  # fmt: skip
        if table.ranked and ranked.scores:
            rank_metrics = metric_table(comparison, ("top5", "accuracy_by_class"))
            print(f"{GUIDANCE}\n\n{markdown(chosen_t(ranked.runs))}\n")
            print(f"Top 5 of the rankings, in percent\n\n{markdown(rank_metrics)}\n")
    if args.format == "markdown":
        print(LEGEND)
        for note in notes:
            print(f"Note: {note}")
        print("Written: " + ", ".join(str(file) for file in files))
    if not shown:
        raise UserError(f"No finished run of these tables in {args.outputs}: {START}.")


def renamed(scores: Iterable[Score], table: Table) -> list[Score]:
    """The scores that a table shows, under the paper's names of their settings."""
    return [
        replace(score, setting=papers)
        for papers, ours in table.settings.items()
        for score in scores
        if score.setting == ours
    ]


def renamed_cells(cells: Iterable[Cell], table: Table) -> set[Cell]:
    """The same for cells that are not applicable."""
    return {
        (model, papers, dataset, tags)
        for papers, ours in table.settings.items()
        for model, setting, dataset, tags in cells
        if setting == ours
    }


def chosen_t(runs: Sequence[ScoredRun]) -> "DataFrame":
    """Which t each guided row uses, and where it was chosen."""
    import pandas as pd

    rows = []
    for run in runs:
        if run.config["split"] != "train":
            rows += [row | {"model": label(row["model"], row["tags"])} for row in run.chosen_t]
    return pd.DataFrame(rows, columns=["model", "setting", "dataset", "t", "t chosen on"])


def write_guidance(home: Path, runs: Sequence[ScoredRun]) -> Path:
    """guidance.csv: top-1 accuracy in percent for every t, by score and prior."""
    import pandas as pd

    home.mkdir(parents=True, exist_ok=True)
    file = home / "guidance.csv"
    columns = ["model", "tags", "dataset", "score", "prior", "t", "accuracy", "n"]
    rows = [row for run in runs for row in run.guidance]
    pd.DataFrame(rows, columns=columns).to_csv(file, index=False, float_format="%.3f")
    return file


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
