"""Print Tables 5 and 13: ours beside the paper's, with baselines, comparisons and what the errors are made of.

    python imagewikiqa/table.py
    python imagewikiqa/table.py --outputs outputs/imagewikiqa --format latex

Reads the runs of answer.py and other_benchmarks.py. Writes table5 and table13 (.md, .csv in the long form, .tex);
comparisons.csv: every fine-tuned model against the same model as it is, on the same questions in the same setting;
causes.csv: the errors of every model that was given the image, the text with the true name and with its own name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmclassifier import cli
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import Prediction, Score, UserError
from vlmclassifier.runs import read_run
from vlmclassifier.scoring.questions import Answers, error_causes, grouped_difference, grouped_proportion, paired_tests
from vlmclassifier.scoring.runs import ScoredRun, collect_runs
from vlmclassifier.tables import (
    LEGEND,
    compare,
    label,
    markdown,
    only_run,
    summary,
    wide_table,
    write_csv,
    write_tables,
)

if TYPE_CHECKING:
    from pandas import DataFrame

PAPER = Path(__file__).parent / "paper.csv"
PAPER_ONLY = {"Human w/ GT Class+Wiki": "paper only"}  # no model: it is not to be reproduced
GIVEN = {"image+name": " w/ GT Class", "text": " w/o Image"}  # what is given -> the end of the paper's name
FINE_TUNED, MIXED = "{} Finetuned on ImageNet", "{} Finetuned on ImageNet+LLaVA"
NOTES = """Intervals of questions are those of a bootstrap over different questions (or classes). multiple_choice: the
paper's prompt with chain of thought, a letter by the paper's rule, a random guess where it finds none. p: sign flips
over different questions (the verdict); McNemar's test is of rows, and too small where rows of one question change
together. free_answer: no options in the prompt; letters_log_prob, options_log_prob: the likeliest letter or text."""


@dataclass
class Args:
    outputs: Path = OUTPUTS / "imagewikiqa"
    """Folder of the runs."""
    all: bool = False
    """Also show the rows of the paper that were not run."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """What to print; all three are written."""


def main(args: Args) -> None:
    """Collect, compare, write and print."""
    collected = collect_runs([args.outputs], ["questions", "vqa"])
    runs = [run for run in collected.runs if run.config["kind"] == "questions" and run.config["form"] != "naming"]
    vqa = [run for run in collected.runs if run.config["kind"] == "vqa"]
    if not collected.runs and collected.notes:
        raise UserError(f"No scores in {args.outputs}: {collected.notes[0]}")
    if not collected.runs:
        raise UserError(f"No answers in {args.outputs}: start with imagewikiqa/answer.py or other_benchmarks.py.")
    files = []
    for name, title, scores in (
        ("table5", "Table 5: ImageWikiQA", question_scores(runs)),
        ("table13", "Table 13: general benchmarks", vqa_scores(vqa)),
    ):
        comparison = compare(scores, PAPER, name)
        wide = with_paper_only(wide_table(comparison, [], paper_models(name), settings=["multiple_choice", "official"]))
        wide = only_run(wide, args.all)
        files += write_tables(wide, comparison, args.outputs, name)
        if args.format == "markdown":
            print(f"{title}, accuracy in percent\n\n{markdown(wide)}\n\n{summary(comparison)}\n")
        else:
            print(files[("csv", "latex").index(args.format) - 2].read_text(encoding="utf-8"))
    for name, title, rows in (
        ("comparisons", "Fine-tuned minus as it is, in points", comparisons(runs)),
        ("causes", "What the errors are made of, rows", causes(collected.runs)),
    ):
        if rows:
            files.append(write_csv(args.outputs / f"{name}.csv", rows))
            if args.format == "markdown":
                print(f"{title}\n\n{markdown(shown(rows))}\n")
    if args.format == "markdown":
        print(f"{NOTES}\n\n{LEGEND}")
        for note in collected.notes:
            print(f"Note: {note}")
        print("Written: " + ", ".join(str(file) for file in files))


def shown(rows: Sequence[Mapping[str, Any]]) -> "DataFrame":
    """A table with numbers of one digit, and p-values of four."""
    import pandas as pd

    table = pd.DataFrame(rows)
    for column in table.columns:
        if table[column].dtype == float:
            table[column] = table[column].map(("{:.4f}" if column in ("p", "mcnemar") else "{:.1f}").format)
    return table


def paper_models(table: str) -> list[str]:
    """The paper's models, in its order."""
    import pandas as pd

    papers = pd.read_csv(PAPER)
    return [*papers[papers["table"] == table]["model"].unique()]


def with_paper_only(wide: "DataFrame") -> "DataFrame":
    """Mark the rows that are no model's."""
    for model, words in PAPER_ONLY.items():
        is_row = wide["model"] == model
        for column in wide.columns[2:]:
            wide.loc[is_row, column] = wide.loc[is_row, column].str.replace("missing", words)
    return wide


def question_scores(runs: Sequence[ScoredRun]) -> list[Score]:
    """The scores of all runs under the paper's names, and the baselines of the largest one of each data set."""
    scores = [score for run in runs for score in papers_scores(run)]
    largest: dict[str, ScoredRun] = {}
    for run in runs:
        name = run.config["benchmark"]
        if name not in largest or run.scores[0].n > largest[name].scores[0].n:
            largest[name] = run
    for run in largest.values():
        scores += baselines(read_run(run.folder)[1], run)
    return scores


def papers_scores(run: ScoredRun) -> list[Score]:
    """The scores of a run by the paper's names of its model."""
    given, found = run.config["given"], []
    for score in run.scores:
        model, setting, tags = score.model, score.setting, score.tags
        if form := papers_training(run):
            model = form.format(model)
            tags = tuple(tag for tag in tags if not tag.startswith("fine-tuned: "))
        if given in GIVEN and run.config["form"] == "letters":
            model += GIVEN[given]
            setting = setting.replace("-with_name", "").replace("-text_only", "")
        found.append(replace(score, model=model, setting=setting, tags=tags))
    return found


def papers_training(run: ScoredRun) -> str | None:
    """The name of the paper's fine-tuned model whose weights a run has: the projector, trained on ImageNet's rows."""
    adapter = run.config.get("adapter") or {}
    if (adapter.get("train"), adapter.get("captions"), adapter.get("benchmark")) != ("projector", False, "imagenet"):
        return None
    return MIXED if adapter["mix"] else FINE_TUNED


def baselines(rows: Sequence[Prediction], run: ScoredRun) -> list[Score]:
    """Random answers, and always the most frequent letter (paper, Table 5)."""
    tags = tuple(tag for tag in run.config["tags"] if "questions" in tag)
    letters = [row.label for row in rows]
    most = max(sorted(set(letters)), key=letters.count)
    hits = [letter == most for letter in letters]
    groups = [row.class_index for row in rows]
    chance = 100 * sum(1 / len(row.choices) for row in rows) / len(rows)
    common = ("multiple_choice", run.config["benchmark"], "accuracy")
    return [
        Score("Random", *common, chance, chance, chance, len(rows), tags),
        Score("Max Freq", *common, *grouped_proportion(hits, groups), tags),
    ]


def vqa_scores(runs: Sequence[ScoredRun]) -> list[Score]:
    """The scores of the general benchmarks; of the paper's fine-tuned model under its setting."""
    found = []
    for run in runs:
        for score in run.scores:
            setting, tags = score.setting, score.tags
            if papers_training(run) == MIXED:
                setting = setting.replace("official", "further_finetuned")
                tags = tuple(tag for tag in tags if not tag.startswith("fine-tuned: "))
            found.append(replace(score, setting=setting, tags=tags))
    return found


def comparisons(runs: Sequence[ScoredRun]) -> list[dict[str, Any]]:
    """Every fine-tuned model against the same checkpoint as it is, over the questions that both have answered."""
    bases = {setting_key(run): run for run in runs if not run.config.get("adapter")}
    rows = []
    for run in runs:
        base = bases.get(setting_key(run))
        if not run.config.get("adapter") or base is None:
            continue
        first, second = right_by_id(run), right_by_id(base)
        both = [one for one in first if one in second]
        groups = {row.example_id: row.class_index for row in read_run(run.folder)[1]}
        values = [first[one] for one in both], [second[one] for one in both], [groups[one] for one in both]
        difference, test = grouped_difference(*values), paired_tests(*values)
        rows.append({
            "model": name_of(run), "setting": run.config["setting"], "dataset": run.config["benchmark"],
            "difference": difference.value, "low": difference.low, "high": difference.high, "p": test.sign_flip,
            "mcnemar": test.mcnemar, "n": len(both), "groups": len(set(values[2])),
        })  # fmt: skip
    return rows


def setting_key(run: ScoredRun) -> tuple:
    """What two runs share that may be compared: everything but the fine-tuning."""
    return (run.config["model"], run.config.get("checkpoint"), run.config["benchmark"], run.config["manifest"],
            run.config["setting"], run.config["max_new_tokens"], run.config.get("dtype"), run.config.get("template"),
            run.config.get("model_id"), run.config.get("base_url"))  # fmt: skip


def right_by_id(run: ScoredRun) -> dict[str, bool]:
    """Question id -> whether the answer is right."""
    rows = read_run(run.folder)[1]
    return dict(zip([row.example_id for row in rows], Answers(rows, run.config["form"]).right, strict=True))


def name_of(run: ScoredRun) -> str:
    """The model with its tags."""
    return label(run.scores[0].model, ", ".join(run.scores[0].tags))


def causes(runs: Sequence[ScoredRun]) -> list[dict[str, Any]]:
    """For every model and form with the four runs that it needs: recognition, knowledge and joining."""
    found: dict[tuple, dict[str, ScoredRun]] = {}
    for run in runs:
        config = run.config
        if config["kind"] != "questions" or config["form"].startswith("rank_"):
            continue
        weights = (config["model"], config.get("checkpoint"), (config.get("adapter") or {}).get("fingerprint"))
        more = tuple(config.get(name) for name in ("model_id", "base_url", "dtype", "template"))
        key = (*weights, *more, config["benchmark"], config["manifest"])
        found.setdefault(key, {})[config["setting"]] = run
    rows = []
    for of_model in found.values():
        naming = of_model.get("naming")
        for setting, run in of_model.items():
            needed = [of_model.get(f"{setting}-text_only-{end}") for end in ("with_name", "own_name")]
            if run.config.get("given") != "image" or naming is None or None in needed or run is naming:
                continue
            right, own, true_name, by_own = (right_by_id(one) for one in (run, naming, *needed))
            both = set(own) & set(true_name) & set(by_own)
            counts = error_causes({key: value for key, value in right.items() if key in both}, own, true_name, by_own)
            rows.append({"model": name_of(run), "setting": setting, **counts})
    return rows


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
