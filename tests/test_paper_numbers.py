"""Protects: every number of the paper has one place, and the table of that section shows it."""

import csv
from collections import Counter

import pandas as pd
import pytest
from conftest import ROOT, script

from vlmclassifier.records import Score
from vlmclassifier.tables import compare, markdown, wide_table

NAMES = {"table3_probing": "table3", "table3_finetuning": "table3"}  # one table, in two sections
DATA_TABLES = ("table11", "appendix_b6", "figure3")  # have their own form


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return [tuple(row.values()) for row in csv.DictReader(stream)]


def test_every_number_of_the_paper_has_one_place_and_is_shown(realdata, tmp_path, capsys):
    published = [(NAMES.get(row[0], row[0]), *row[1:]) for row in rows_of(realdata.parent / "paper" / "published.csv")]
    sections = {file.parent: rows_of(file) for file in sorted(ROOT.glob("*/paper.csv"))}
    places = Counter(row for rows in sections.values() for row in rows)
    assert len(published) == 350
    # CLIP's linear rows are printed in Table 3 and Table 4 of the paper; each table's section has its own.
    assert [row for row in published if places[row] != 1] == []
    assert set(places) == set(published)
    for section, rows in sections.items():
        shown = pd.DataFrame(rows, columns=["table", "model", "setting", "dataset", "metric", "value"])
        for table, numbers in shown.groupby("table"):
            if table in DATA_TABLES:
                continue
            comparison = compare([], section / "paper.csv", table)
            assert len(comparison) == len(numbers)
            wide = wide_table(comparison[comparison["metric"] == "accuracy"], sorted(set(numbers["dataset"])), [])
            text = markdown(wide)
            accuracies = numbers[numbers["metric"] == "accuracy"]
            assert text.count("missing (") == len(accuracies), table
    module = script("data_analysis/table.py")
    (tmp_path / "run").mkdir()
    header = "model,tags,setting,dataset,source,classes,statistic,value,low,high,null_low,null_high,p,n,counts"
    (tmp_path / "run" / "correlations.csv").write_text(
        f"{header}\nx,,open_world,y,total,all,spearman,0,0,0,0,0,1,9,z\n"
    )
    module.main(module.Args(tmp_path, all=True))
    printed = capsys.readouterr().out
    data = [row for row in published if row[0] in DATA_TABLES]
    assert printed.count("missing (") == sum(row[0] != "figure3" for row in data)
    assert all(f"{float(row[5]):g}" in printed for row in data if row[0] == "figure3")


@pytest.mark.parametrize("row", [Score("x", "y", "z", "accuracy", 1.0, 0.0, 2.0, 3)])
def test_rows_that_the_paper_does_not_have_are_shown_too(row):
    comparison = compare([row], ROOT / "imagewikiqa" / "paper.csv", "table5")
    assert len(comparison) == 19 and (comparison["value"].notna()).sum() == 1
