"""From run folders and paper.csv to a table: ours beside the paper's, as Markdown, CSV and LaTeX."""

import csv
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vlmclassifier.benchmarks import BENCHMARKS
from vlmclassifier.models import MODELS
from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.prompts import setting_name
from vlmclassifier.records import Score, UserError
from vlmclassifier.runs import has_rows, read_record, read_run
from vlmclassifier.scoring import (
    PAPER_METRIC,
    Difference,
    Scorer,
    by_class,
    differences,
    pooled,
    summarise,
    wilson_interval,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from vlmclassifier.scoring.semantic import Encoder

OUTPUTS = Path(os.environ.get("VLMCLASSIFIER_OUTPUTS", PROJECT_ROOT / "outputs"))  # another disk, say
KEYS = ["model", "setting", "dataset"]
IMPORTED = " (imported)"  # answers of the paper's own runs: the paper's number stands beside them too
LEGEND = (
    "Cells: ours in percent [95% Wilson interval] n=pictures (paper's number, difference in points, whether the "
    "paper's number lies inside our interval). missing: not run yet. N/A: the question does not fit the model's "
    "context, or neither we nor the paper have a number. Marked rows (miniature: random or mini weights; split: not "
    "the test split; another id or server of an API; a note of the manifest) are never compared with the paper."
)


@dataclass(frozen=True)
class ScoredRun:
    """What the saved answers of one finished run say."""

    scores: list[Score]
    differences: list[Difference]  # of the metrics from the paper's, for answers in words
    classes: list[tuple[int, str, int, int]]  # class index, name, pictures, right answers by the paper's metric


def score_run(folder: Path, section: str, table: str, encoder: "Encoder | None" = None) -> ScoredRun:
    """Score one finished run folder from its saved answers; `encoder` adds the metric "semantic".

    Raises UserError when it cannot be read.
    """
    record, predictions = read_run(folder)
    config = record["config"]
    try:
        cell = cell_of(config)
        hits = Scorer(config["classes"], config["kind"], encoder).hits(predictions)
        scores = [Score(section, table, *cell, *row) for row in summarise(predictions, hits)]
        apart = differences(predictions, hits) if PAPER_METRIC[config["kind"]] == "contains" else []
        counts = by_class(predictions, hits["accuracy"]).items()
        classes = [(index, config["classes"][index], n, right) for index, (right, n) in counts]
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'run.json'} is not a finished run ({error!r}): move the folder away.") from None
    return ScoredRun(scores, apart, classes)


def run_scores(folder: Path, section: str, table: str) -> list[Score]:
    """The scores of one finished run folder. Raises UserError when it cannot be read."""
    return score_run(folder, section, table).scores


def cell_of(config: dict) -> tuple[str, str, str]:
    """Model, setting and dataset of a classify run, in the words of paper.csv."""
    asked = ("candidates", "wording", "order", "chain_of_thought", "seed")
    return model_of(config), setting_name(**{key: config[key] for key in asked if key in config}), config["benchmark"]


def model_of(config: dict) -> str:
    """The model of a run in the words of paper.csv; a marked one is never the paper's."""
    spec = MODELS.get(config["model"])
    model = spec.paper_name if spec and spec.paper_name else config["model"]
    benchmark = BENCHMARKS.get(config["benchmark"])
    test_split = benchmark.test_split if benchmark else "test"
    marks = ["miniature"] * config["miniature"] + [f"split {config['split']}"] * (config["split"] != test_split)
    marks += [config["note"]] if "note" in config else []  # of the manifest
    if config["kind"] == "api":  # the paper's names stand for its ids at their own servers
        marks += [config["model_id"]] * bool(spec and config["model_id"] != spec.source)
        marks += [f"at {urlsplit(config['base_url']).netloc}"] * bool(config["base_url"])
    marks += ["imported"] * ("imported" in config)
    if marks:  # another name: never joined with the paper's rows, but for IMPORTED alone
        model += f" ({', '.join(marks)})"
    return model


def not_applicable(outputs: Path) -> set[tuple[str, str, str]]:
    """Model, setting and dataset of the runs below `outputs` whose question does not fit the model's context."""
    records = [read_record(file.parent) for file in sorted(outputs.glob("*/run.json"))]
    return {cell_of(record["config"]) for record in records if "not_applicable" in record}


def collect_scores(outputs: Path, section: str, table: str) -> tuple[list[Score], list[str]]:
    """Scores of every finished run below `outputs`, and notes on the runs that are not shown: see `collect_runs`."""
    runs, notes = collect_runs(outputs, section, table)
    return [score for run in runs for score in run.scores], notes


def collect_runs(
    outputs: Path, section: str, table: str, encoder: "Encoder | None" = None
) -> tuple[list[ScoredRun], list[str]]:
    """Every finished run below `outputs`, scored, and notes on the runs that are not shown.

    Of several runs of one cell the one with the most examples counts, then the latest.
    """
    best: dict[tuple[str, str, str], tuple[int, str, ScoredRun]] = {}
    notes = []
    for file in sorted(outputs.glob("*/run.json")):
        record = read_record(file.parent)
        if "not_applicable" in record:
            notes.append(f"{file.parent.name} is N/A: {record['not_applicable']}")
            continue
        if record["finished"] is None:
            remove = "" if has_rows(file.parent) else ", or remove the folder if it was a mistake"
            notes.append(
                f"{file.parent.name} is unfinished: repeat its command to finish its {record['target']} rows{remove}."
            )
            continue
        run = score_run(file.parent, section, table, encoder)
        key = (run.scores[0].model, run.scores[0].setting, run.scores[0].dataset)
        rank = (run.scores[0].n, record["finished"], run)
        if key in best:
            notes.append(
                f"{' / '.join(key)} has several runs: the one with the most examples, then the latest, counts."
            )
        best[key] = max(best.get(key, rank), rank, key=lambda entry: entry[:2])
    return [run for _, _, run in best.values()], notes


def compare(scores: Sequence[Score], paper: Path, table: str) -> "DataFrame":
    """Our scores joined with the paper's, one row per model, setting, dataset and metric.

    Columns: the keys, metric, value, low, high, n, paper, difference (points), inside (the paper's number lies in our
    interval). Rows that only the paper has keep an empty value, so that a missing cell is visible.
    """
    import pandas as pd

    columns = [field.name for field in fields(Score)]
    ours = pd.DataFrame([asdict(score) for score in scores], columns=columns).drop(columns=["section", "table"])
    ours = ours.astype(dict.fromkeys(["value", "low", "high", "n"], float))
    published = pd.read_csv(paper)
    published = published[published["table"] == table].drop(columns="table").rename(columns={"value": "paper"})
    again = published.assign(model=published["model"] + IMPORTED).merge(ours[[*KEYS, "metric"]], on=[*KEYS, "metric"])
    joined = pd.concat([published, again]).merge(ours, how="outer", on=[*KEYS, "metric"])
    joined["difference"] = joined["value"] - joined["paper"]
    joined["inside"] = (joined["low"] <= joined["paper"]) & (joined["paper"] <= joined["high"])
    joined["inside"] = joined["inside"].astype(object).where(joined["difference"].notna(), None)
    return joined[[*KEYS, "metric", "value", "low", "high", "n", "paper", "difference", "inside"]]


def wide_table(
    comparison: "DataFrame",
    datasets: Sequence[str],
    models: Sequence[str],
    absent: Collection[tuple[str, str, str]] = (),
    settings: Sequence[str] = ("open_world", "closed_world"),
) -> "DataFrame":
    """One row per setting and model, one column per dataset, cells as in LEGEND, in the order of `settings`, `models`.

    `absent`: the cells of `not_applicable`.
    """
    import pandas as pd

    rows = comparison[comparison["metric"] == "accuracy"]
    cells = {(row.model, row.setting, row.dataset): _cell(row) for row in rows.itertuples()}
    for key in absent:
        cells[key] = cells.get(key, "N/A").replace("missing", "N/A")
    columns = [*datasets, *sorted(set(rows["dataset"]) - set(datasets))]
    place = {model: number for number, model in enumerate(models)}
    turn = {setting: number for number, setting in enumerate(settings)}
    order = sorted(
        {key[:2] for key in cells},
        key=lambda key: (turn.get(key[1], len(turn)), key[1], place.get(_base(key[0]), len(place)), key[0]),
    )
    body = [[model, setting, *(cells.get((model, setting, d), "N/A") for d in columns)] for model, setting in order]
    return pd.DataFrame(body, columns=["model", "setting", *columns])


def difference_table(runs: Sequence[ScoredRun]) -> "DataFrame":
    """How each metric differs from the paper's on the same answers, by way of asking, with the commonest examples."""
    import pandas as pd

    parts: dict[tuple[str, str], list[Difference]] = {}
    for run in runs:
        for part in run.differences:
            parts.setdefault((run.scores[0].setting, part.metric), []).append(part)
    body = []
    for (setting, metric), some in sorted(parts.items(), key=lambda item: (item[0][0] != "open_world", item[0])):
        one = pooled(some)
        body.append([setting, metric, one.n, one.paper_only, one.paper_example, one.metric_only, one.metric_example])
    sides = ("paper's only", "example (paper's only)", "this one only", "example (this one only)")
    columns = ["setting", "metric", "n", *sides]
    return pd.DataFrame(body, columns=columns)


def details(comparison: "DataFrame", metrics: Sequence[str]) -> "DataFrame":
    """Every metric of every cell that we have, with n: how the metrics differ.

    A metric that counts fewer pictures has its own n in a column behind it.
    """
    ours = comparison[comparison["value"].notna() & comparison["metric"].isin(metrics)]
    values, counts = (ours.pivot_table(index=KEYS, columns="metric", values=column) for column in ("value", "n"))
    table, most = counts.max(axis=1).astype(int).to_frame("n"), counts.max(axis=1)
    for metric in [metric for metric in metrics if metric in values]:
        table[metric] = values[metric]
        fewer = counts[metric].where(counts[metric] < most)
        if fewer.notna().any():
            table[f"n of {metric}"] = fewer.map("{:.0f}".format, na_action="ignore").fillna("")
    return table.reset_index().rename_axis(columns=None)


def write_tables(
    wide: "DataFrame", comparison: "DataFrame", folder: Path, name: str, legend: str = LEGEND
) -> list[Path]:
    """Write NAME.md (wide, with the legend), NAME.csv (long, every metric) and NAME.tex (wide); return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{suffix}" for suffix in ("md", "csv", "tex")]
    files[0].write_text(f"{markdown(wide)}\n\n{legend}\n", encoding="utf-8")
    comparison.to_csv(files[1], index=False)
    text = wide.to_latex(index=False, escape=True, na_rep="", column_format="ll" + "r" * (wide.shape[1] - 2))
    files[2].write_text(text, encoding="utf-8")
    return files


def write_scores(folder: Path, section: str, table: str) -> list[Score]:
    """Score a finished run; write its scores.csv and classes.csv (each class's accuracy); return the scores."""
    run = score_run(folder, section, table)
    save_scores(folder, run.scores)
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["class_index", "class", "n", "right", "accuracy", "low", "high"])
        for index, name, n, right in run.classes:
            low, high = wilson_interval(right, n)
            writer.writerow([index, name, n, right, 100 * right / n, 100 * low, 100 * high])
    return run.scores


def run_folder(given: Path | None, section: str, name: str, setting: str, several: bool) -> Path:
    """Where a run lies: `given` (--out), with -SETTING behind it where there are several, else below OUTPUTS."""
    if given is None:
        return OUTPUTS / section / f"{name}-{setting}"
    if not several:
        return given
    named = given if given.name else given.absolute()  # "." has no name
    return named.with_name(f"{named.name}-{setting}")


def save_scores(folder: Path, scores: Sequence[Score]) -> None:
    """Write a run's scores.csv."""
    with open(folder / "scores.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Score)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores)


def markdown(table: "DataFrame") -> str:
    """A pipe table; numbers with one decimal."""
    text = table.map(lambda value: f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|"))
    return text.replace("nan", "").to_markdown(index=False, disable_numparse=True)


def _base(model: str) -> str:
    return model.split(" (")[0]


def _cell(row: object) -> str:
    if row.value != row.value:  # NaN: only the paper has it
        return f"missing ({row.paper:.1f})"
    text = f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}] n={row.n:.0f}"
    if row.paper == row.paper:
        text += f" ({row.paper:.1f}, {row.difference:+.1f}, {'inside' if row.inside else 'outside'})"
    return text
