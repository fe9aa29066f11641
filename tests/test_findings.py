"""Protects: the findings' statistics, their file, the table over seeds, and the study's own bookkeeping."""

import math

import pytest
from conftest import ROOT, script

from vlmclassifier.findings import (
    Finding,
    error_ratio,
    independent_difference,
    over_seeds,
    paired_difference,
    proportion,
    read_findings,
    readable,
    verdict,
    write_findings,
)
from vlmclassifier.records import UserError


def test_differences_and_their_intervals():
    first, second = [True] * 60 + [False] * 40, [True] * 30 + [False] * 70
    paired = paired_difference("F1", "gap", first, second)
    assert paired.value == pytest.approx(30) and paired.n == 100
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 100) * 100  # the differences are 30 ones and 70 zeros
    assert paired.low == pytest.approx(30 - spread, abs=1.5) and paired.high == pytest.approx(30 + spread, abs=1.5)
    apart = independent_difference("F4", "gap", first, second)
    assert apart.value == pytest.approx(30) and apart.n == 200
    # Newcombe (1998), method 10: 56/70 - 48/80 = 0.2, interval 0.0524 to 0.3339
    newcombe = independent_difference("", "", [True] * 56 + [False] * 14, [True] * 48 + [False] * 32)
    assert (newcombe.low, newcombe.high) == (pytest.approx(5.24, abs=0.01), pytest.approx(33.39, abs=0.01))
    ratio = error_ratio("F2", "errors", second, first)
    assert ratio.value == pytest.approx(70.5 / 40.5) and ratio.low < ratio.value < ratio.high
    assert error_ratio("", "", first, [True] * 100).value == pytest.approx(40.5 / 0.5)
    with pytest.raises(UserError, match="no picture for 'accuracy'"):
        proportion("F1", "accuracy", [])


def test_the_file_gives_the_rows_back(tmp_path):
    rows = [
        Finding("F1", "CLIP", 92.5, 90.0, 94.25, 1920, 74.8),
        Finding("F4", "gap", 60.0, 55.5, 65.0, 1280, None, verdict(True, by_construction=True)),
    ]
    write_findings(rows, tmp_path / "findings.csv")
    assert (tmp_path / "findings.csv").read_text().splitlines()[:2] == [
        "finding,metric,value,low,high,n,paper,holds", "F1,CLIP,92.5,90.0,94.25,1920,74.8,",
    ]  # fmt: skip
    assert read_findings(tmp_path / "findings.csv") == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of findings"):
        read_findings(tmp_path / "other.csv")


def test_several_seeds_show_the_spread_and_count_the_verdicts():
    tables = [
        [Finding("F1", "gap", value, value - 1, value + 1, 100, 52.0, holds), Finding("F4", "only here", 1, 1, 1, 1)]
        for value, holds in ((60.0, "holds"), (50.0, "holds"), (10.0, "does not hold"))
    ]
    tables[1].pop()
    (row,) = over_seeds(tables)
    assert (row.value, row.low, row.high, row.n, row.paper) == (40.0, 10.0, 60.0, 300, 52.0)
    assert row.holds == "holds in 2 of 3" and "smallest, largest" in readable([row], seeds=3)
    assert over_seeds(tables[:1]) == tables[0]


def test_another_recipe_moves_the_old_folder_aside_and_back(tmp_path, monkeypatch):
    module = script("scripts/study.py")
    root = tmp_path / "seed-0"
    module.claim(root, module.Args(), 0)
    (root / "result").write_text("mine")
    module.claim(root, module.Args(), 0)
    assert (root / "result").read_text() == "mine"
    module.claim(root, module.Args(preset="photos"), 0)
    assert not (root / "result").exists()
    (aside,) = tmp_path.glob("seed-0.*")
    assert (aside / "result").read_text() == "mine"
    module.claim(root, module.Args(), 0)
    assert (root / "result").read_text() == "mine" and not aside.exists()


def test_every_section_of_the_study_has_its_script():
    for section in script("scripts/study.py").SECTIONS:
        assert "--root" in (ROOT / section / "study.py").read_text()
