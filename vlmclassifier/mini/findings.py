"""The findings F1 to F6 of the study: rows with a value, its interval, the paper's number, and whether it holds."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from vlmclassifier.records import UserError
from vlmclassifier.scoring import statistics
from vlmclassifier.scoring.statistics import Estimate


@dataclass(frozen=True)
class Finding:
    """One row. Values are percentages or percentage points, or ratios where `metric` says so."""

    finding: str  # such as "F1"; empty for a row that is only reported
    metric: str
    value: float
    low: float
    high: float
    n: int  # images
    paper: float | None = None  # the paper's number
    holds: str = ""  # see `verdict`


def finding(name: str, metric: str, estimate: Estimate, paper: float | None = None, holds: str = "") -> Finding:
    """Return the row of an estimate."""
    return Finding(name, metric, *estimate, paper, holds)


def accuracy(name: str, metric: str, hits: Sequence[bool], paper: float | None = None) -> Finding:
    """Return the row of an accuracy. Raises UserError when there are no hits to average."""
    if not hits:
        raise UserError(f"There is no image for {metric!r}: evaluate more images.")
    return finding(name, metric, statistics.proportion(hits), paper)


def verdict(holds: bool, by_construction: bool = False) -> str:
    """Return the text of the last column. `by_construction`: the data set was built so that the finding should hold."""
    if not holds:
        return "does not hold"
    return "holds (by construction)" if by_construction else "holds"


def judged(holds: bool, *numbers: float, by_construction: bool = False) -> str:
    """As `verdict`, where the numbers that it depends on exist: a correlation has none where nothing varies."""
    if any(number != number for number in numbers):
        return "cannot be judged: the accuracy does not vary over classes"
    return verdict(holds, by_construction)


def paper_number(file: Path, table: str, model: str, setting: str) -> float | None:
    """Return the paper's number on ImageNet from a section's paper.csv, or None if the file has no such row."""
    key = (table, model, setting, "imagenet")
    with open(file, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if (row["table"], row["model"], row["setting"], row["dataset"]) == key:
                return float(row["value"])
    return None


def without_paper(rows: Sequence[Finding], benchmark: str) -> list[Finding]:
    """Return the rows, for images of the user without the paper's numbers, which are of ImageNet."""
    return list(rows) if benchmark == "plane_figures" else [replace(row, paper=None) for row in rows]


def write_findings(rows: Iterable[Finding], file: Path) -> None:
    """Write rows as CSV: finding,metric,value,low,high,n,paper,holds.

    Numbers have six decimals, so that one decimal of them is the same here, in the tables and in `readable`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    with open(unfinished, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Finding)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            for key, value in values.items():
                if isinstance(value, float):
                    values[key] = round(value, 6)
            writer.writerow(values)
    unfinished.replace(file)


def read_findings(file: Path) -> list[Finding]:
    """Read the rows of `write_findings`. Raises UserError for a file of another form."""
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            return [
                Finding(
                    row["finding"], row["metric"], float(row["value"]), float(row["low"]), float(row["high"]),
                    int(row["n"]), float(row["paper"]) if row["paper"] else None, row["holds"],
                )
                for row in csv.DictReader(stream)
            ]  # fmt: skip
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} is not a table of findings ({error}): run the study's section again.") from None


def over_seeds(tables: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Merge the tables of several seeds: the mean, with the smallest and the largest value in place of the interval.

    The last column counts the seeds in which the finding holds. Rows that not every seed has are left out.
    """
    if len(tables) == 1:
        return list(tables[0])
    merged = []
    for row in tables[0]:
        matching = []  # this row of every seed
        for table in tables:
            for candidate in table:
                if (candidate.finding, candidate.metric) == (row.finding, row.metric):
                    matching.append(candidate)
        if len(matching) != len(tables):
            continue
        values = [match.value for match in matching]
        holds = ""
        judged = [match for match in matching if match.holds.startswith(("holds", "does not hold"))]
        undecided = sum(match.holds.startswith("cannot be judged") for match in matching)
        if judged:
            count = sum(match.holds.startswith("holds") for match in judged)
            holds = f"holds in {count} of {len(matching)}"
            holds += f", cannot be judged in {undecided}" if undecided else ""
        elif undecided:
            holds = f"cannot be judged in {undecided} of {len(matching)}"
        if judged and any("by construction" in match.holds for match in matching):
            holds += " (by construction)"
        merged.append(
            Finding(
                row.finding, row.metric, sum(values) / len(values), min(values), max(values),
                sum(match.n for match in matching), row.paper, holds,
            )
        )  # fmt: skip
    return merged


def _value(row: Finding) -> str:
    if row.metric.startswith("t of "):  # a setting, which may have two decimals
        return f"{row.value:g}"
    decimals = _decimals(row)
    return f"{row.value:.{decimals}f} [{row.low:.{decimals}f}, {row.high:.{decimals}f}]"


def _decimals(row: Finding) -> int:
    """Coefficients have two decimals, percentages one."""
    return 2 if row.metric.startswith(("slope", "Spearman")) else 1


def readable(rows: Sequence[Finding], seeds: int = 1) -> str:
    """Return a Markdown table. Brackets contain the interval, or for several seeds the smallest and largest value.

    Without any number of the paper, as on images of the user, there is no column for it.
    """
    from tabulate import tabulate

    range_name = "smallest, largest" if seeds > 1 else "95% interval"
    table = [
        (
            row.finding, row.metric, _value(row), row.n,
            "" if row.paper is None else f"{row.paper:.{_decimals(row)}f}", row.holds,
        )
        for row in rows
    ]  # fmt: skip
    headers = ["finding", "metric", f"value [{range_name}]", "n", "paper", "holds"]
    if all(row.paper is None for row in rows):
        table = [(*row[:4], *row[5:]) for row in table]
        headers.remove("paper")
    return tabulate(table, headers, tablefmt="pipe", disable_numparse=True)
