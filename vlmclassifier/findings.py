"""The study's findings F1 to F6, each as rows "value, interval, the paper's number, does it hold"."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vlmclassifier.records import UserError
from vlmclassifier.runs import read_run
from vlmclassifier.scoring import METRICS, PAPER_METRIC

RESAMPLES = 2000
Hits = dict[str, tuple[str, bool]]  # picture -> label, and whether the answer was right


@dataclass(frozen=True)
class Finding:
    """One row. Values are percentages, points or, where `metric` says so, ratios; `paper`: its number."""

    finding: str  # "F1"; "" for a row that is only reported
    metric: str
    value: float
    low: float
    high: float
    n: int
    paper: float | None = None
    holds: str = ""


def proportion(finding: str, metric: str, hits: Sequence[bool], paper: float | None = None) -> Finding:
    """An accuracy with its 95% Wilson interval. Raises UserError where there is no picture to count."""
    from vlmclassifier.scoring import wilson_interval

    if not hits:
        raise UserError(f"There is no picture for {metric!r}: evaluate more pictures.")
    low, high = wilson_interval(sum(hits), len(hits))
    return Finding(finding, metric, 100 * sum(hits) / len(hits), 100 * low, 100 * high, len(hits), paper)


def paired_difference(
    finding: str,
    metric: str,
    first: Sequence[bool],
    second: Sequence[bool],
    paper: float | None = None,
) -> Finding:
    """Accuracy of `first` minus that of `second` on the same pictures; 95% paired-bootstrap interval (points)."""
    import numpy as np

    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    rng = np.random.default_rng(0)
    means = np.array([difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(RESAMPLES)])
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return Finding(finding, metric, 100 * difference.mean(), float(low), float(high), len(difference), paper)


def error_ratio(finding: str, metric: str, model: Sequence[bool], reference: Sequence[bool]) -> Finding:
    """Errors of one model per error of another on the same pictures, half an error added to each, with a 95% interval.

    The interval is a paired bootstrap's (percentiles).
    """
    import numpy as np

    errors = 1.0 - np.stack([np.asarray(model, dtype=float), np.asarray(reference, dtype=float)])  # [2, pictures]
    rng, n = np.random.default_rng(0), errors.shape[1]
    counts = np.stack([errors[:, rng.integers(n, size=n)].sum(axis=1) for _ in range(RESAMPLES)]) + 0.5
    low, high = np.percentile(counts[:, 0] / counts[:, 1], [2.5, 97.5])
    value = (errors[0].sum() + 0.5) / (errors[1].sum() + 0.5)
    return Finding(finding, metric, float(value), float(low), float(high), n)


def independent_difference(
    finding: str,
    metric: str,
    first: Sequence[bool],
    second: Sequence[bool],
    paper: float | None = None,
) -> Finding:
    """The same for two different sets of pictures (Newcombe's interval from the two Wilson intervals)."""
    a, b = proportion("", metric, first), proportion("", metric, second)
    value = a.value - b.value
    low = value - ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
    high = value + ((a.high - a.value) ** 2 + (b.value - b.low) ** 2) ** 0.5
    return Finding(finding, metric, value, low, high, a.n + b.n, paper)


def verdict(holds: bool, by_construction: bool = False) -> str:
    """The word in the last column; `by_construction`: the world was made so that it should."""
    if not holds:
        return "does not hold"
    return "holds (by construction)" if by_construction else "holds"


def right_answers(run: Path) -> Hits:
    """Of every picture of a run its label and whether the answer was right by the paper's metric."""
    record, predictions = read_run(run)
    metric = METRICS[PAPER_METRIC[record["config"]["kind"]]]
    return {p.example_id: (p.label, metric(p)) for p in predictions}


def values(answers: Hits) -> list[bool]:
    """The hits alone, in the order of the pictures' ids."""
    return [hit for _, (_, hit) in sorted(answers.items())]


def paper_number(file: Path, table: str, model: str, setting: str) -> float | None:
    """The paper's number on ImageNet in a section's paper.csv, where it has one."""
    with open(file, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if (row["table"], row["model"], row["setting"], row["dataset"]) == (table, model, setting, "imagenet"):
                return float(row["value"])
    return None


def write_findings(rows: Iterable[Finding], file: Path) -> None:
    """Write finding,metric,value,low,high,n,paper,holds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    with open(unfinished, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Finding)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = {key: round(v, 2) if isinstance(v, float) else v for key, v in asdict(row).items()}
            writer.writerow(values)
    unfinished.replace(file)


def read_findings(file: Path) -> list[Finding]:
    """The inverse of `write_findings`. Raises UserError for another file."""
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
    """One table of several seeds' tables: the mean, with the smallest and the largest value in place of the interval.

    The last column counts the seeds in which the finding holds. Rows that not every seed has are left out.
    """
    if len(tables) == 1:
        return list(tables[0])
    merged = []
    for row in tables[0]:
        same = [
            other for table in tables for other in table if (other.finding, other.metric) == (row.finding, row.metric)
        ]
        if len(same) != len(tables):
            continue
        values = [other.value for other in same]
        holds = ""
        if row.holds:
            count = sum(other.holds.startswith("holds") for other in same)
            made = any("by construction" in other.holds for other in same)
            holds = f"holds in {count} of {len(same)}{' (by construction)' if made else ''}"
        merged.append(
            Finding(
                row.finding, row.metric, sum(values) / len(values), min(values), max(values),
                sum(other.n for other in same), row.paper, holds,
            )
        )  # fmt: skip
    return merged


def readable(rows: Sequence[Finding], seeds: int = 1) -> str:
    """A Markdown table; of several seeds the brackets hold the smallest and largest value."""
    from tabulate import tabulate

    bracket = "smallest, largest" if seeds > 1 else "95% interval"
    table = [
        (
            row.finding, row.metric, f"{row.value:.1f} [{row.low:.1f}, {row.high:.1f}]", row.n,
            "" if row.paper is None else f"{row.paper:.1f}", row.holds,
        )
        for row in rows
    ]  # fmt: skip
    headers = ["finding", "metric", f"value [{bracket}]", "n", "paper", "holds"]
    return tabulate(table, headers, tablefmt="pipe", disable_numparse=True)
