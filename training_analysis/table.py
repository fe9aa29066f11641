"""Print Table 3 (right), Table 4 and section 4's accuracy after fine-tuning: ours beside the paper's numbers.

    python training_analysis/table.py
    python training_analysis/table.py --outputs outputs/training_analysis --format latex

Reads the answers of fine-tuned models (runs of classify_vlm.py --adapter), the epochs of finetune_vlm.py, the answers
of models as they are, and of CLIP the linear probes. Writes table3, table4 and section4 (.md, .csv in the long form,
.tex), and frequency.csv: Spearman's correlation of how often classes are named with their accuracy, before and after
fine-tuning, from the results of data_analysis/correlate.py; data_analysis/table.py has the paper's (Table 11).
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from vlmclassifier.identity import training_record
from vlmclassifier.models import display_name
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import Score, UserError
from vlmclassifier.scoring.intervals import wilson_interval
from vlmclassifier.scoring.runs import ScoredRun, collect_runs
from vlmclassifier.tables import LEGEND, compare, markdown, only_run, summary, wide_table, write_tables

PAPER = Path(__file__).parent / "paper.csv"
TITLES = {
    "table3": "Table 3, right: fine-tuning on classification rows", "table4": "Table 4: fine-tuning on captions",
    "section4": "Section 4: the mixture",
}  # fmt: skip
# --train -> the paper's name of the row. Its BLIP-2 trains the Q-Former side and is called projector, too.
SETTINGS = {"projector": "projector", "projector+lora": "projector_and_lm_lora", "qformer": "projector"}
FINE_TUNED = "fine-tuned: "  # the tag of weights that were fine-tuned begins so
MIXTURE_MODEL = "{} Finetuned on ImageNet+LLaVA"
RULES = """A row of the paper is judged by the paper's rule: the epoch that is best on the test images (--evaluate-test
with --evaluated at least their number). Rows that end in held_out choose it on held-out train images and are our
numbers; last_epoch chooses nothing. What differs from the paper's settings is in the tags. accuracy: the label is
contained in the answer; exact: it equals the answer."""


@dataclass
class Args:
    outputs: Path = OUTPUTS / "training_analysis"
    """Folder of the trainings and of the answers of fine-tuned models."""
    clip: Path = OUTPUTS / "feature_analysis"
    """Folder of the linear probes on CLIP's features."""
    zero_shot: Path = OUTPUTS / "main_results"
    """Folder of the answers before fine-tuning."""
    frequency: Path = OUTPUTS / "data_analysis"
    """Folder of the folders of correlate.py."""
    all: bool = False
    """Also show the rows of the paper that were not run."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    """Collect, compare with the paper, write and print."""
    import pandas as pd

    collected = collect_runs([args.outputs], ["vlm"])
    scores, notes = [], list(collected.notes)
    for run in collected.runs:
        scores += fine_tuned_scores(run, notes)
    scores += papers_rule_scores(args.outputs, notes)
    others = other_scores(args)
    if not scores and all(table == "table4" for table, _ in others):  # zero-shot answers alone
        raise UserError(f"No answers of fine-tuned models in {args.outputs}: start with training_analysis/*.sh.")
    scores += others
    papers = pd.read_csv(PAPER)
    files = []
    for name, title in TITLES.items():
        own = [score for table, score in scores if table == name]
        published = papers[papers["table"] == name]
        comparison = compare(own, PAPER, name)
        datasets = [key for key in PAPER_BENCHMARKS if key in set(published["dataset"])]
        order = ([*published["model"].unique()], (), [*published["setting"].unique()])
        wide = only_run(wide_table(comparison, datasets, *order), args.all)
        files += write_tables(wide, comparison, args.outputs, name)
        if args.format == "markdown":
            print(f"{title}, accuracy in percent\n\n{markdown(wide)}\n\n{summary(comparison)}\n")
        else:
            print(files[("csv", "latex").index(args.format) - 2].read_text(encoding="utf-8"))
    files += frequency_table(args)
    if args.format == "markdown":
        print(f"{RULES}\n\n{LEGEND}")
        for note in notes:
            print(f"Note: {note}")
        print("Written: " + ", ".join(str(file) for file in files))


def frequency_table(args: Args) -> list[Path]:
    """Write and print Spearman's coefficients of fine-tuned models, and of the same models as they were."""
    import pandas as pd

    tables = [pd.read_csv(file, dtype={"tags": str}) for file in sorted(args.frequency.glob("*/correlations.csv"))]
    if not tables:
        return []
    rows = pd.concat(tables, ignore_index=True).fillna({"tags": ""})
    rows = rows[(rows["statistic"] == "spearman") & (rows["classes"] == "all")]
    is_tuned = rows["tags"].str.contains(FINE_TUNED)
    rows = rows.assign(counts=rows.get("counts", ""))
    kind = ["model", "dataset", "source", "counts"]
    tuned = set(rows.loc[is_tuned, kind].itertuples(index=False, name=None))
    of_tuned = pd.Series([row in tuned for row in rows[kind].itertuples(index=False, name=None)], rows.index)
    rows = rows[of_tuned & (is_tuned | (rows["setting"] == "open_world"))]
    if rows.empty:
        return []
    columns = [*kind, "setting", "tags", "value", "low", "high", "n"]
    rows = rows.assign(after=is_tuned).sort_values([*kind, "after", "setting", "tags"])[columns]
    file = args.outputs / "frequency.csv"
    rows.to_csv(file, index=False)
    if args.format == "markdown":
        numbers = {name: rows[name].map("{:.2f}".format) for name in ("value", "low", "high")}
        print(f"Spearman, naming texts and accuracy over n classes\n\n{markdown(rows.assign(**numbers))}\n")
    return [file]


def other_scores(args: Args) -> list[tuple[str, Score]]:
    """What stands beside fine-tuned models: CLIP's linear probe, and the models that were fine-tuned, as they were."""
    found = []
    for score in collect_runs([args.clip, args.outputs], ["probe"]).scores:
        head, _, end = score.setting.partition("-")
        if head in ("linear", "full") and end in ("", "held_out", "last_epoch"):
            found.append(("table3", score))
            if head == "linear":
                setting = score.setting.replace("linear", "finetuned_classification_data")
                found.append(("table4", replace(score, setting=setting)))
    for score in collect_runs([args.zero_shot], ["vlm"]).scores:
        if score.setting == "open_world" and not any(tag.startswith(FINE_TUNED) for tag in score.tags):
            found.append(("table4", replace(score, setting="zero_shot")))
    return found


def fine_tuned_scores(run: ScoredRun, notes: list[str]) -> list[tuple[str, Score]]:
    """The scores of a fine-tuned model's answers with the tables that show them; adds why a run is in none."""
    adapter = run.config.get("adapter")
    if adapter is None or run.config["split"] == "train":
        return []
    asked = (run.config["candidates"], run.config["wording"], run.config["chain_of_thought"])
    if asked != ("none", adapter.get("wording", "base"), False):
        notes.append(f"{run.folder.name} asks another question than the one that was trained: it is in no table here.")
        return []
    end = {"best": "-held_out", "last": "-last_epoch"}.get(adapter["rule"], f"-{adapter['rule']}")
    found = []
    for score in run.scores:
        tags = tuple(tag for tag in score.tags if not tag.startswith(FINE_TUNED) and tag != "trained further")
        if adapter["benchmark"] != run.config["benchmark"]:
            tags = (*tags, f"fine-tuned on {adapter['benchmark']}")
        for table, model, setting in rows_of(adapter, score.model):
            found.append((table, replace(score, model=model, setting=setting + end, tags=tags)))
    return found


def rows_of(adapter: dict[str, Any], model: str) -> list[tuple[str, str, str]]:
    """Table, model and setting of the paper's rows that a fine-tuned model belongs to."""
    setting = SETTINGS.get(adapter["train"], adapter["train"])
    if adapter["captions"] and not adapter["mix"]:
        return [("table4", model, "finetuned_captioning_data")]
    if adapter["mix"]:
        return [("section4", MIXTURE_MODEL.format(model), "open_world")]
    rows = [("table3", model, setting)]
    return rows + ([("table4", model, "finetuned_classification_data")] if setting == "projector" else [])


def papers_rule_scores(outputs: Path, notes: list[str]) -> list[tuple[str, Score]]:
    """For every finished training that has answered test images: the epoch that is best on them.

    Where several are of one cell, the folder's name is a tag of each.
    """
    found: list[tuple[str, Score, str]] = []
    for file in sorted(outputs.glob("*/epochs.csv")):
        with open(file, newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("test")]
        if not rows:
            continue
        record = training_record(file.parent)
        trained = record["config"]
        if not record["finished"]:
            notes.append(f"{file.parent.name} is not finished: its best epoch on test images is not shown.")
            continue
        best = max(rows, key=lambda row: float(row["test"]))
        n = int(best["test_n"])
        right = round(float(best["test"]) * n / 100)
        low, high = wilson_interval(right, n)
        adapter = {"train": trained["train"], "captions": trained["captions"], "mix": trained["mix"]}
        tags = training_tags(trained, n, record)
        for table, model, setting in rows_of(adapter, display_name(trained["model"])):
            score = Score(
                model, setting, trained["benchmark"], "accuracy", 100 * right / n, 100 * low, 100 * high, n, tags
            )
            found.append((table, score, file.parent.name))
    cells = Counter((table, score.model, score.setting, score.dataset, score.tags) for table, score, _ in found)
    named = []
    for table, score, folder in found:
        if cells[table, score.model, score.setting, score.dataset, score.tags] > 1:
            score = replace(score, tags=(*score.tags, folder))
        named.append((table, score))
    return named


def training_tags(trained: dict[str, Any], n: int, record: dict[str, Any]) -> tuple[str, ...]:
    """What makes a training's epochs differ from the paper's."""
    benchmark = BENCHMARKS.get(trained["benchmark"])
    rows = benchmark.paper_rows if benchmark else {}
    tags: Sequence[str] = record.get("tags", [])
    papers = rows.get(benchmark.test_split) if benchmark else None
    own = [f"{n:,} of {papers:,} images"] if papers and n != papers else []
    own += [f"{100 * trained['held_out']:g}% of the train rows held out"] if trained["held_out"] else []
    return (*tags, *record["deviations"], *own)


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
