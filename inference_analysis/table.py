"""Print Tables 2, 9 and 12 from whatever runs exist: ours beside the paper's numbers.

    python inference_analysis/table.py
    python inference_analysis/table.py --outputs outputs --format latex

Reads the runs of main_results/classify_*.py and of rank_labels.py. Writes table2, table9 and table12 (.md, .csv in the
long form with every metric, .tex) and guidance.csv (accuracy by t, for Figure 6) into outputs/inference_analysis.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS
from vlmclassifier.records import Score, UserError
from vlmclassifier.runs import read_record
from vlmclassifier.tables import (
    LEGEND,
    OUTPUTS,
    collect_scores,
    compare,
    details,
    markdown,
    model_of,
    not_applicable,
    wide_table,
    write_tables,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from vlmclassifier.ranking.results import Ranking

PAPER = Path(__file__).parent / "paper.csv"
# The paper's words for our settings, table by table.
PROMPTS = {
    "base_prompt": "open_world", "prompt_alternative_1": "open_world-prompt_alternative_1",
    "prompt_alternative_2": "open_world-prompt_alternative_2",
    "prompt_alternative_3": "open_world-prompt_alternative_3",
    "label_fixed_order": "closed_world-label_fixed_order", "label_random_order": "closed_world",
    "label_random_order_cot": "closed_world-cot",
}  # fmt: skip
RANKED = [f"{way}{cfg}" for cfg in ("", "_cfg", "_cfg_held_out", "_cfg_mean_prior", "_cfg_mean_prior_held_out")
          for way in ("prob_sum", "prob_avg")]  # fmt: skip
SIZES = {f"{count}_classes": f"{count}_classes" for count in (2, 5, 20, 100)}
TABLES = {"table2": PROMPTS | {"direct_generation": "open_world"}, "table9": SIZES | {"all_classes": "closed_world"},
          "table12": PROMPTS}  # fmt: skip
APIS = ("GPT4", "GeminiPro", "Claude3")
GUIDANCE = """Guidance: t * log p(name | image, prompt) + (1 - t) * log p(name | prompt). "cfg" takes the whole t from 0
to 8 that is best on the evaluated pictures, as the paper does; its row prob_avg_cfg is the one that is compared with
the paper's, which is called "Avg" while the reference code sums: prob_sum_cfg stands beside it. "mean_prior": the prior
is the mean over the evaluated pictures, as in the reference code, instead of the prompt without the picture.
"held_out": t is chosen on the train split where it has been ranked, else for each half of the pictures on the other
half: these are our numbers."""

START = "start with inference_analysis/rank_labels.sh, prompts.sh or label_set_size.sh"


@dataclass
class Args:
    outputs: Path = OUTPUTS
    """Folder that holds main_results and inference_analysis."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    """Collect, rename, print."""
    import pandas as pd

    if not args.outputs.is_dir():
        raise UserError(f"The folder {args.outputs} is absent, so there are no runs: {START}.")
    home = args.outputs / "inference_analysis"
    asked, notes = collect_scores(args.outputs / "main_results", "inference_analysis", "")
    rankings, more = finished(home)
    notes += more
    ranked, more = rank_scores(home, rankings)
    notes += more
    clips = {model_of(c) for c in configs(args.outputs / "main_results") if c.get("kind") == "clip"}
    papers, shown = pd.read_csv(PAPER), 0
    files = [write_guidance(home, rankings)]
    for table, words in TABLES.items():
        belongs = partial(belongs_to, table, clips)
        mine = [replace(s, table=table, setting=word) for word, ours in words.items() for s in asked
                if s.setting == ours and belongs(s.model)]  # fmt: skip
        mine += ranked if table == "table2" else []
        absent = {(model, word, dataset) for model, ours, dataset in not_applicable(args.outputs / "main_results")
                  for word, setting in words.items() if setting == ours and belongs(model)}  # fmt: skip
        absent |= without_context(home) if table == "table2" else set()
        comparison = compare(mine, PAPER, table)
        models = list(papers[papers["table"] == table]["model"].unique())
        wide = wide_table(comparison, list(PAPER_BENCHMARKS), models, absent, settings(table, comparison))
        files += write_tables(wide, comparison, home, table)
        shown += len(mine)
        if args.format == "markdown":
            print(f"Table {table[5:]}: accuracy in percent\n\n{markdown(wide)}\n")
            if table == "table2" and ranked:
                print(f"{GUIDANCE}\n\n{markdown(chosen(rankings))}\n\nTop 5 of the rankings, in percent\n\n"
                      f"{markdown(details(comparison, ('top5', 'accuracy_by_class')))}\n")  # fmt: skip
        else:
            print(files[("csv", "latex").index(args.format) - 2].read_text(encoding="utf-8"))
    if args.format == "markdown":
        print(LEGEND)
        for note in notes:
            print(f"Note: {note}")
        print("Written: " + ", ".join(map(str, files)))
    if not shown:
        raise UserError(f"No finished run of these tables lies below {args.outputs}: {START}.")


def belongs_to(table: str, clips: Collection[str], model: str) -> bool:
    """Table 12 is that of the APIs, Table 2 that of the other models that answer; CLIP stands in Table 9 alone."""
    api = model.split(" (")[0] in APIS
    return api == (table == "table12") and (table == "table9" or model not in clips)


def configs(home: Path) -> list[dict]:
    """The configurations of the runs below a folder."""
    return [read_record(file.parent)["config"] for file in sorted(home.glob("*/run.json"))]


def settings(table: str, comparison: "DataFrame") -> list[str]:
    """The order of the rows: the paper's words as listed here, then the ways of ranking."""
    order = [*TABLES[table], *(RANKED if table == "table2" else [])]
    return order + sorted(set(comparison["setting"]) - set(order))


def finished(home: Path) -> "tuple[dict[Path, Ranking], list[str]]":
    """The finished full rankings below a folder, and notes on the runs that are not shown."""
    from vlmclassifier.ranking.results import read_ranking

    rankings, notes = {}, []
    for file in sorted(home.glob("*/run.json")):
        record = read_record(file.parent)
        if record["config"].get("kind") != "ranking":
            continue
        if "not_applicable" in record:
            notes.append(f"{file.parent.name} is N/A: {record['not_applicable']}")
        elif record["finished"] is None:
            notes.append(f"{file.parent.name} is unfinished: repeat its command to finish its {record['target']} rows.")
        elif record["config"]["top_k"] is None:
            rankings[file.parent] = read_ranking(file.parent)
    return rankings, notes


def without_context(home: Path) -> set[tuple[str, str, str]]:
    """Model, setting and dataset of the rankings whose prompt does not fit the model's context."""
    records = [read_record(file.parent) for file in sorted(home.glob("*/run.json"))]
    return {(model_of(r["config"]), setting, r["config"]["benchmark"]) for r in records if "not_applicable" in r
            for setting in RANKED if r["config"].get("kind") == "ranking"}  # fmt: skip


def rank_scores(home: Path, rankings: "dict[Path, Ranking]") -> tuple[list[Score], list[str]]:
    """Scores of the rankings, and notes; of several of one cell the one with most pictures counts, a full one first.

    Those of the train split choose t and are no rows.
    """
    from vlmclassifier.ranking.results import of_train, scores_of

    best: dict[tuple, tuple] = {}
    notes: list[str] = []
    for file in sorted(home.glob("*/run.json")):
        record, folder = read_record(file.parent), file.parent
        config = record["config"]
        if config.get("kind") != "ranking" or record["finished"] is None or config["split"] == "train":
            continue
        ranking = rankings.get(folder)
        train = of_train(ranking, list(rankings.values())) if ranking else None
        cells: dict[tuple, list[Score]] = {}
        for score in scores_of(folder, "inference_analysis", "table2", train, ranking):
            cells.setdefault((score.model, score.setting, score.dataset), []).append(score)
        for key, scores in cells.items():
            entry = (scores[0].n, ranking is not None, record["finished"], scores)
            if key in best:
                notes.append(
                    f"{' / '.join(key)}: of several rankings the one with most pictures, then a full one, counts."
                )
            best[key] = max(best.get(key, entry), entry, key=lambda one: one[:3])
    return [score for entry in best.values() for score in entry[3]], list(dict.fromkeys(notes))


def chosen(rankings: "dict[Path, Ranking]") -> "DataFrame":
    """Which t each guided row uses, and where it was chosen."""
    import pandas as pd

    from vlmclassifier.ranking.results import of_train, suffix

    rows = []
    for ranking in (r for r in rankings.values() if r.config["split"] != "train"):
        for way in ranking.ways(of_train(ranking, list(rankings.values()))):
            if way.chosen_on:
                t = "each half its own" if way.scoring.t != way.scoring.t else f"{way.scoring.t:g}"
                rows.append((model_of(ranking.config), way.setting + suffix(ranking.config),
                             ranking.config["benchmark"], t, way.chosen_on))  # fmt: skip
    return pd.DataFrame(rows, columns=["model", "setting", "dataset", "t", "t chosen on"])


def write_guidance(home: Path, rankings: "dict[Path, Ranking]") -> Path:
    """guidance.csv: top-1 accuracy in percent for every t, by score and prior."""
    import pandas as pd

    from vlmclassifier.ranking import GRID
    from vlmclassifier.ranking.results import PRIORS, suffix

    rows = [
        (model_of(r.config), r.config["benchmark"], score + suffix(r.config), prior, t, 100 * hits.mean(), len(hits))
        for r in rankings.values() for score, per_token in (("sum", False), ("mean", True)) for prior in PRIORS
        for t, hits in zip(GRID, r.curve(per_token, prior), strict=True)
    ]  # fmt: skip
    file = home / "guidance.csv"
    home.mkdir(parents=True, exist_ok=True)
    columns = ["model", "dataset", "score", "prior", "t", "accuracy", "n"]
    pd.DataFrame(rows, columns=columns).to_csv(file, index=False, float_format="%.3f")
    return file


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
