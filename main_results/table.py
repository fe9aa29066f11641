"""Print Tables 1 and 8 from whatever runs exist, ours beside the paper's numbers, and how the metrics differ.

    python main_results/table.py
    python main_results/table.py --format latex
    python main_results/table.py --semantic all-MiniLM-L6-v2
    python main_results/table.py --import-file outputs/flowers_llava7b.jsonl --model llava-1.5-7b --benchmark flowers

Writes table1, table8 and metrics as .md, .csv and .tex beside the runs (table1.csv in long form, with every metric).
--import-file makes a run of an output file of the paper's own code first (its local models and its three API forms); it
is scored like ours, marked as imported, and the paper's number stands beside it. A line of it needs an answer (pred,
output or OpenAI's choices) and a label (label, or the third part of custom_id), and should name its picture:
{"image": "./data/Flowers102/jpg/image_00001.jpg", "label": "passion flower", "split": "test", "pred": "A flower."}
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmclassifier import cli
from vlmclassifier.benchmarks import PAPER_BENCHMARKS, class_names, find_benchmark
from vlmclassifier.importing import import_run
from vlmclassifier.prompts import ways
from vlmclassifier.records import Score, UserError
from vlmclassifier.tables import (
    LEGEND,
    OUTPUTS,
    collect_runs,
    compare,
    details,
    difference_table,
    markdown,
    not_applicable,
    wide_table,
    write_scores,
    write_tables,
)

if TYPE_CHECKING:
    from vlmclassifier.scoring.semantic import Encoder

PAPER = Path(__file__).parent / "paper.csv"
WORLDS = ("open_world", "closed_world")  # other settings belong to other tables
SYNONYMS = {"without_synonyms": "accuracy", "with_synonyms": "contains_synonym"}  # Table 8: setting -> our metric
METRICS = (
    "contains", "exact", "contains_words", "unique", "contains_synonym", "semantic", "make_model", "real",
    "mean_per_class", "accuracy_by_class", "no_class", "no_candidate", "several_candidates", "echo", "empty", "refusal",
)  # fmt: skip
DIFFERENCES = (
    "How the metrics differ from the paper's, which asks whether the label is a substring of the answer: of n answers "
    "of all runs above, those that are right by the paper's metric only or by this one only, with the commonest answer."
)


@dataclass
class Args:
    outputs: Path = OUTPUTS / "main_results"
    """Folder of the run folders."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""
    semantic: Path | None = None
    """Folder of a sentence-transformers model: adds the metric "semantic" (the class nearest to the answer)."""
    import_file: Path | None = None
    """An output file of the paper's code, to be made a run first; the options below say what it holds."""
    model: str | None = None
    """With --import-file: the key of its model in vlmclassifier/models.py, or OWNER/NAME for any other VLM."""
    benchmark: str | None = None
    """With --import-file: imagenet, flowers, cars, caltech, or a manifest FILE.jsonl of your own (with --classes)."""
    classes: Path | None = None
    """With --import-file: class list of your own manifest."""
    candidates: str = "none"
    """With --import-file: none, all or K candidates were listed."""
    order: Literal["random", "fixed"] = "random"
    """With --import-file: order of the candidates."""
    wording: Literal["base", "alternative_1", "alternative_2", "alternative_3"] = "base"
    """With --import-file: wording of the question."""
    chain_of_thought: bool = False
    """With --import-file: the model was told to think step by step."""


def main(args: Args) -> None:
    """Import where asked; score every run; write and print the tables."""
    import pandas as pd

    if args.import_file:
        take_in(args)
    elif args.model or args.benchmark:
        raise UserError("--model and --benchmark go with --import-file: the tables show whatever runs exist.")
    runs, notes = collect_runs(args.outputs, "main_results", "table1", load_encoder(args.semantic))
    runs = [run for run in runs if run.scores[0].setting in WORLDS]
    absent = {cell for cell in not_applicable(args.outputs) if cell[1] in WORLDS}
    if not runs and not absent:
        unfinished = "".join(f"\nNote: {note}" for note in notes)
        raise UserError(
            f"No finished run of Table 1 lies below {args.outputs}: start with main_results/table1.sh.{unfinished}"
        )
    scores = [score for run in runs for score in run.scores]
    models = list(pd.read_csv(PAPER)["model"].unique())
    first, eighth = compare(scores, PAPER, "table1"), compare(with_synonyms(scores), PAPER, "table8")
    table1 = wide_table(first, list(PAPER_BENCHMARKS), models, absent)
    side_by_side = eighth.assign(dataset=eighth["setting"], setting="open_world")
    table8 = wide_table(side_by_side, list(SYNONYMS), models)
    apart = difference_table(runs)
    files = [
        write_tables(table1, first, args.outputs, "table1"),
        write_tables(table8, eighth, args.outputs, "table8"),
        write_tables(apart, apart, args.outputs, "metrics", DIFFERENCES),
    ]
    if args.format != "markdown":
        for forms in files:
            print(forms[("markdown", "csv", "latex").index(args.format)].read_text(encoding="utf-8"))
        return
    print(f"Table 1: accuracy in percent\n\n{markdown(table1)}\n")
    print(f"Table 8: on ImageNet, without and with WordNet's other names of a class\n\n{markdown(table8)}\n")
    print(f"{LEGEND}\n")
    if scores:
        print(f"All metrics of our runs, in percent\n\n{markdown(details(first, METRICS))}\n")
        print(f"{DIFFERENCES}\n\n{markdown(apart)}\n")
    for note in notes:
        print(f"Note: {note}")
    print("Written: " + ", ".join(str(file) for forms in files for file in forms))


def take_in(args: Args) -> None:
    """Make a run of an output file of the paper's code."""
    if not args.model or not args.benchmark:
        raise UserError("--import-file needs --model and --benchmark: its rows do not say what answered what.")
    names = class_names(find_benchmark(args.benchmark, args.classes))
    asked = ways([args.candidates], [args.order], [args.wording], names, args.chain_of_thought)
    ((setting, way),) = asked.items()
    folder = (
        args.outputs
        / f"{args.model.replace('/', '-')}-{Path(args.benchmark).stem}-{setting}-imported-{args.import_file.stem}"
    )
    told = (args.model, args.benchmark, args.classes, way, args.chain_of_thought)
    said = import_run(args.import_file, folder, *told)
    if setting not in WORLDS:
        print(f"Note: {setting} belongs to the tables of inference_analysis/table.py.", file=sys.stderr)
    write_scores(folder, "main_results", "table1")
    print(f"{args.import_file} is now the run {folder}: {'; '.join(said)}.", file=sys.stderr)


def load_encoder(folder: Path | None) -> "Encoder | None":
    """The model of --semantic."""
    if folder is None:
        return None
    from vlmclassifier.scoring.semantic import Encoder

    return Encoder(folder)


def with_synonyms(scores: Sequence[Score]) -> list[Score]:
    """The rows of Table 8: ImageNet in the open world, by the paper's metric and by contains_synonym."""
    asked = {(score.model, score.setting, score.dataset) for score in scores if score.metric == "contains_synonym"}
    return [
        replace(score, table="table8", setting=setting, metric="accuracy")
        for setting, metric in SYNONYMS.items()
        for score in scores
        if score.metric == metric and score.setting == "open_world"
        and (score.model, score.setting, score.dataset) in asked
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
