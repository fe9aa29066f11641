"""What the report shows: findings, tables, figures and runs below an outputs folder, and what is missing there."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlmclassifier.mini.findings import Finding, read_findings
from vlmclassifier.models import display_name
from vlmclassifier.records import UserError
from vlmclassifier.runs import read_record, read_rows
from vlmclassifier.tables import label

SECTIONS = {
    "main_results": "Main results (section 2)", "inference_analysis": "Inference (section 3.1)",
    "feature_analysis": "Features (section 3.2)", "data_analysis": "Data (section 3.3)",
    "training_analysis": "Training (sections 3.2 and 4)",
    "imagewikiqa": "ImageWikiQA and general benchmarks (section 4)",
}  # fmt: skip
# The tables of a section, in the order of the page: file -> title.
TABLES = {
    "main_results": {"table1": "Table 1", "table8": "Table 8", "other_settings": "Other settings",
                     "metrics": "Metrics against the paper's"},
    "inference_analysis": {"table2": "Table 2", "table9": "Table 9", "table12": "Table 12",
                           "calibration/calibration": "Calibration (beyond the paper)",
                           "calibration/hierarchy": "Names with a given certainty (beyond the paper)"},
    "feature_analysis": {"table3": "Table 3 (probing)", "table10": "Table 10", "few_shot": "Few train images"},
    "data_analysis": {"table11": "Table 11", "intervention/slopes": "Designed frequencies: slopes"},
    "training_analysis": {"table3": "Table 3 (fine-tuning)", "table4": "Table 4", "section4": "Section 4",
                          "frequency": "Frequency before and after", "forgetting/forgetting": "Forgetting"},
    "imagewikiqa": {"table5": "Table 5", "table13": "Table 13", "comparisons": "Fine-tuned minus as it is",
                    "causes": "What the errors are made of"},
}  # fmt: skip
MOST_ROWS = 400  # of a table on the page; the file has all
HIDDEN = (
    "inside",
    "rows_hash",
    "loss_before",
    "loss_after",
    "abstaining_threshold",
    "tags",
)  # columns of the long form that the page does not need


@dataclass
class Table:
    """A table for the page. `cells`: rows of texts; rows that only the paper has are marked."""

    title: str
    file: str  # relative to the page
    columns: list[str]
    rows: list[list[str]]
    papers_only: list[list[str]] = field(default_factory=list)
    left_out: int = 0


@dataclass
class RunRow:
    """A run for the list of all runs."""

    folder: str
    model: str
    setting: str
    dataset: str
    rows: str
    state: str
    minutes: str
    cost: str
    commit: str
    versions: str


@dataclass
class Section:
    """A section's part of the page."""

    key: str
    title: str
    tables: list[Table] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    runs: list[RunRow] = field(default_factory=list)


@dataclass
class Collected:
    """Everything that was found, and one sentence for everything that could not be read."""

    sections: list[Section]
    findings: list[Finding]
    notes: list[str]
    folders: list[Path]  # of finished runs


def collect(root: Path, out: Path) -> Collected:
    """Read what is below an outputs folder. `out`: the folder of the page, which links to the tables' files."""
    sections, findings, notes, folders = [], [], [], []
    for key, title in SECTIONS.items():
        section = Section(key, title)
        for file in (root / key / "findings.csv", root / key / "intervention" / "findings.csv"):
            if file.exists():
                try:
                    findings += read_findings(file)
                except UserError as error:
                    notes.append(str(error))
        for name, words in TABLES[key].items():
            file = root / key / f"{name}.csv"
            if file.exists():
                try:
                    section.tables.append(read_table(file, words, out))
                except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
                    notes.append(f"{file} cannot be read ({error}): write it again with {key}/table.py.")
        for file in sorted((root / key).rglob("run.json")):
            run_row(file.parent, section, notes, folders)
        if not (section.runs or section.tables):
            notes.append(f"{title}: nothing was run yet; {key}/README.md says how.")
        sections.append(section)
    return Collected(sections, findings, notes, folders)


def read_table(file: Path, title: str, out: Path) -> Table:
    """A CSV as texts. Of a table in the long form only accuracies are shown, the paper's own rows apart."""
    with open(file, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        rows, names = list(reader), list(reader.fieldnames or [])
    if not names:
        raise ValueError("it is empty")
    if any(None in row.values() for row in rows):
        raise ValueError("a row is cut off")
    link = quote(Path(os.path.relpath(file, out)).as_posix())
    if {"model", "setting", "dataset", "metric", "value", "paper"} <= set(names):
        return long_table(rows, title, link)
    columns = [name for name in names if name not in HIDDEN and not name.endswith(("_low", "_high"))]
    body = [[with_interval(row, name) for name in columns] for row in rows]
    return Table(title, link, columns, body[:MOST_ROWS], left_out=max(0, len(body) - MOST_ROWS))


def long_table(rows: Sequence[dict[str, str]], title: str, link: str) -> Table:
    """One row per model and setting, one column per data set: ours, its interval, n, and the paper's number."""
    rows = [row for row in rows if row["metric"] == "accuracy"]
    datasets = list(dict.fromkeys(row["dataset"] for row in sorted(rows, key=lambda row: not row["value"])))
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        cells.setdefault((label(row["model"], row["tags"]), row["setting"]), {})[row["dataset"]] = row
    ours, papers = [], []
    for (model, setting), found in cells.items():
        is_ours = any(row["value"] for row in found.values())
        texts = [cell_text(found[dataset]) if dataset in found else "" for dataset in datasets]
        (ours if is_ours else papers).append([model, setting.replace("_", " "), *texts])
    return Table(title, link, ["model", "setting", *datasets], ours[:MOST_ROWS], papers, max(0, len(ours) - MOST_ROWS))


def cell_text(row: dict[str, str]) -> str:
    """A cell: ours with its interval, then the paper's number."""
    papers = f"paper {float(row['paper']):.1f}" if row["paper"] else ""
    if not row["value"]:
        return papers
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    inside = {"True": " (inside)", "False": " (outside)"}.get(row["inside"], "")
    return f"{value:.1f} [{low:.1f}, {high:.1f}] n={float(row['n']):.0f}" + (f"; {papers}{inside}" if papers else "")


def with_interval(row: dict[str, str], name: str) -> str:
    """A number with its interval, where the table has one."""
    ends = [row.get(f"{name}_{end}") for end in ("low", "high")]
    text = number(row[name])
    return f"{text} [{number(str(ends[0]))}, {number(str(ends[1]))}]" if all(ends) else text


def number(text: str) -> str:
    """A number of a table with at most three decimals; other texts as they are."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return text or ""
    return text if value.is_integer() else f"{value:.3f}".rstrip("0")


def run_row(folder: Path, section: Section, notes: list[str], folders: list[Path]) -> None:
    """Add one run to its section; one that cannot be read or is unfinished becomes a note."""
    try:
        record = read_record(folder)
        config = record["config"]
        finished = record["finished"]
        session = record["sessions"][-1] if record["sessions"] else {}
        state = "finished" if finished else "N/A" if "not_applicable" in record else "unfinished"
        section.runs.append(RunRow(
            folder.name, label(display_name(config["model"]), ", ".join(config["tags"])), setting_of(config),
            config["benchmark"], f"{record['rows']:,} of {record['target']:,}", state,
            minutes(record["started"], finished), cost_of(folder, config),
            str(session.get("git_commit") or "")[:9] + ("-dirty" if "dirty" in str(session.get("git_commit")) else ""),
            ", ".join(f"{name} {session['versions'][name]}" for name in ("torch", "transformers")
                      if name in session.get("versions", {})),
        ))  # fmt: skip
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        notes.append(f"{folder / 'run.json'} cannot be read ({error}): run it again, or remove the folder.")
        return
    if finished:
        folders.append(folder)
    elif state == "unfinished":
        notes.append(f"{folder} is unfinished ({record['rows']:,} of {record['target']:,} rows): repeat its command.")


def setting_of(config: dict[str, Any]) -> str:
    """A run's setting in words."""
    from vlmclassifier.prompts import PromptSetting

    if "setting" in config:
        return str(config["setting"])
    if "candidates" not in config and config["kind"] != "ranking":
        return str(config["script"])
    if config["kind"] == "ranking":
        return "ranking" if config["top_k"] is None else f"ranking, top {config['top_k']}"
    return PromptSetting.from_config(config).name


def minutes(started: str | None, finished: str | None) -> str:
    """Wall time from the first start to the end; a run that was stopped in between has its pauses in it."""
    if not (started and finished):
        return ""
    seconds = (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()
    return f"{seconds / 60:.1f}"


def cost_of(folder: Path, config: dict[str, Any]) -> str:
    """The tokens that the servers counted, of a run behind an API, with its cost where the prices are known."""
    if config["kind"] != "api" and "base_url" not in config:
        return ""
    from vlmclassifier.api.costs import recorded_usage
    from vlmclassifier.models import MODELS

    usage = recorded_usage(read_rows(folder))
    spec = MODELS.get(config["model"])
    return usage.sentence(spec.prices if spec else None) if usage.calls else ""


def versions_of(collected: Collected) -> list[str]:
    """Every combination of commit and versions that made a finished run, with the number of its runs."""
    counts: dict[str, int] = {}
    for section in collected.sections:
        for run in section.runs:
            key = f"commit {run.commit or 'unknown'}: {run.versions}"
            counts[key] = counts.get(key, 0) + 1
    return [f"{key} ({count} runs)" for key, count in sorted(counts.items(), key=lambda pair: -pair[1])]
