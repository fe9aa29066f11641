"""From scores and paper.csv to a table: ours beside the paper's, as Markdown, CSV and LaTeX."""

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.records import Score
from vlmclassifier.scoring.differences import Difference, pooled
from vlmclassifier.scoring.metrics import METRICS
from vlmclassifier.scoring.runs import Cell, ScoredRun

if TYPE_CHECKING:
    from pandas import DataFrame

KEYS = ["model", "setting", "dataset"]
KEY_COLUMNS = (*KEYS, "counts", "source", "probe", "tokens")  # of wide tables: what a row is of
IMPORTED = "imported"  # the tag of answers of the paper's own runs, which are compared with the paper's numbers too
LEGEND = (
    "Cells: ours in percent ±half the width of its 95% interval (the paper's number; * where it is outside our "
    "interval). The .csv beside this table has intervals, n and every metric. missing: not run yet. N/A: the prompt "
    "does not fit the model's context, or neither we nor the paper have a number. Rows with a tag in parentheses "
    "(miniature: random or mini weights; split: not the test split; another id or server of an API; a note of the "
    "manifest) are never compared with the paper."
)


def label(model: str, tags: str) -> str:
    """A model with the tags of its runs, for people to read."""
    return f"{model} ({tags})" if tags else model


def compare(scores: Sequence[Score], paper: Path, table: str) -> "DataFrame":
    """Our scores joined with the paper's, one row per model, tags, setting, dataset and metric.

    Columns: the keys, tags, metric, value, low, high, n, paper, difference (points), inside (the paper's number is in
    our interval). Rows that only the paper has keep an empty value, so that a missing cell is visible.
    """
    import pandas as pd

    keys = [*KEYS, "metric"]
    rows = [asdict(score) | {"tags": ", ".join(score.tags)} for score in scores]
    ours = pd.DataFrame(rows, columns=[one.name for one in fields(Score)])
    ours = ours.astype(dict.fromkeys(["value", "low", "high", "n"], float))
    published = pd.read_csv(paper)
    published = published[published["table"] == table].drop(columns="table").rename(columns={"value": "paper"})
    joined = ours.merge(published, how="left", on=keys)
    joined.loc[~joined["tags"].isin(["", IMPORTED]), "paper"] = None
    untagged = set(ours.loc[ours["tags"] == "", keys].itertuples(index=False, name=None))
    is_missing = [row not in untagged for row in published[keys].itertuples(index=False, name=None)]
    joined = pd.concat([joined, published[is_missing].assign(tags="")])
    joined["difference"] = joined["value"] - joined["paper"]
    inside = (joined["low"] <= joined["paper"]) & (joined["paper"] <= joined["high"])
    joined["inside"] = inside.astype(object).where(joined["difference"].notna(), None)
    columns = [*KEYS, "tags", "metric", "value", "low", "high", "n", "paper", "difference", "inside"]
    return joined[columns].sort_values([*keys, "tags"], ignore_index=True)


def wide_table(
    comparison: "DataFrame",
    datasets: Sequence[str],
    models: Sequence[str],
    not_applicable: Collection[Cell] = (),
    settings: Sequence[str] = ("open_world", "closed_world"),
) -> "DataFrame":
    """One row per setting, model and tags, one column per dataset, cells as in LEGEND.

    Rows are in the order of `settings` and `models`, others after them.
    """
    import pandas as pd

    rows = comparison[comparison["metric"] == "accuracy"]
    cells = {(row.setting, row.model, row.tags, row.dataset): _cell(row) for row in rows.itertuples()}
    for model, setting, dataset, tags in not_applicable:
        cell = (setting, model, ", ".join(tags), dataset)
        cells[cell] = cells.get(cell, "N/A").replace("missing", "N/A")
    columns = [*datasets, *sorted(set(rows["dataset"]) - set(datasets))]

    def order(row: tuple[str, str, str]) -> tuple:
        setting, model, tags = row
        return (_place(setting, settings), setting, _place(model, models), model, tags)

    body = []
    for setting, model, tags in sorted({cell[:3] for cell in cells}, key=order):
        found = [cells.get((setting, model, tags, dataset), "N/A") for dataset in columns]
        body.append([label(model, tags), setting, *found])
    return pd.DataFrame(body, columns=["model", "setting", *columns])


def only_run(wide: "DataFrame", everything: bool = False) -> "DataFrame":
    """The rows of a wide table in which a cell was run here, or is N/A for a run; `everything`: all rows."""
    if everything:
        return wide
    text = wide.drop(columns=[column for column in KEY_COLUMNS if column in wide]).astype(str)
    is_na = text == "N/A"
    others = text.map(lambda cell: cell.startswith(("missing", "paper only")) or cell == "")
    kept = wide[(~(is_na | others)).any(axis=1) | is_na.all(axis=1)]
    empty = [column for column in text if len(kept) and (kept[column].astype(str) == "N/A").all()]
    return kept.drop(columns=empty if len(empty) < text.shape[1] else [])  # data sets that nobody has asked for


def summary(comparison: "DataFrame") -> str:
    """How much of a table is run, in one sentence."""
    rows = comparison[comparison["metric"] == "accuracy"] if "metric" in comparison else comparison
    compared = rows[rows["difference"].notna()]
    ours = int(rows["value"].notna().sum())
    papers = int(rows["paper"].notna().sum())
    inside = int(sum(compared["inside"] == True))  # noqa: E712 - the column holds None too
    text = (
        f"{len(compared)} of the paper's {papers} cells are run, {inside} of them with its number inside our interval"
    )
    more = ours - len(compared)
    return f"{text}; {more} more of ours are compared with nothing." if more else f"{text}."


def _place(item: str, items: Sequence[str]) -> int:
    return items.index(item) if item in items else len(items)


def difference_table(runs: Sequence[ScoredRun]) -> "DataFrame":
    """How each metric differs from the paper's on the same answers, by setting, with the most frequent examples."""
    import pandas as pd

    parts: dict[tuple[str, str], list[Difference]] = {}
    for run in runs:
        for part in run.differences:
            parts.setdefault((run.scores[0].setting, part.metric), []).append(part)
    body = []
    for setting, metric in sorted(parts, key=lambda key: (key[0] != "open_world", key)):
        one = pooled(parts[setting, metric])
        body.append([setting, metric, one.n, one.paper_only, one.paper_example, one.metric_only, one.metric_example])
    sides = ("paper's only", "example (paper's only)", "this one only", "example (this one only)")
    return pd.DataFrame(body, columns=["setting", "metric", "n", *sides])


def metric_table(comparison: "DataFrame", metrics: Sequence[str] = tuple(METRICS)) -> "DataFrame":
    """Every metric of every cell that we have, with n. A metric that counts fewer images has its own n beside it."""
    ours = comparison[comparison["value"].notna() & comparison["metric"].isin(metrics)]
    ours = ours.assign(model=[label(row.model, row.tags) for row in ours.itertuples()])
    values = ours.pivot_table(index=KEYS, columns="metric", values="value")
    counts = ours.pivot_table(index=KEYS, columns="metric", values="n")
    most = counts.max(axis=1)
    table = most.astype(int).to_frame("n")
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
    files[2].write_text(latex(wide), encoding="utf-8")
    return files


def latex(wide: "DataFrame") -> str:
    """A booktabs table in words: no underscores, the plus-minus in mathematics."""
    words = wide.map(lambda cell: cell.replace("_", " ") if isinstance(cell, str) else cell)
    words = words.rename(columns=lambda name: name.replace("_", " "))
    columns = "ll" + "r" * (wide.shape[1] - 2)
    text = words.to_latex(index=False, escape=True, na_rep="", column_format=columns, float_format="%.1f")
    return text.replace(" ±", " $\\pm$ ")


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Path:
    """Write rows as CSV, floats with six decimals, and return the file. `columns`: default those of the first row."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if columns is None else columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return file


def markdown(table: "DataFrame") -> str:
    """A pipe table; numbers with one decimal."""
    text = table.map(lambda value: f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|"))
    return text.replace("nan", "").to_markdown(index=False, disable_numparse=True)


def _cell(row: object) -> str:
    if row.value != row.value:  # NaN: only the paper has it
        return f"missing ({row.paper:.1f})"
    text = f"{row.value:.1f} ±{(row.high - row.low) / 2:.1f}"
    if row.paper == row.paper:
        text += f" ({row.paper:.1f}{'' if row.inside else '*'})"
    return text
