"""Protects: doses are balanced over classes, planted slopes are found, and the trainings run and resume."""

import csv
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from conftest import run_script, script

from vlmclassifier.records import UserError
from vlmclassifier.scoring import dose_response
from vlmclassifier.scoring.dose_response import (
    Observation,
    confounded_doses,
    designed_doses,
    dose_curve,
    latin_square,
    slope_per_doubling,
)

DOSES = (0.0, 0.1, 0.3, 1.0)
NAMES = [f"class {number}" for number in range(26)]


def test_the_latin_square_is_balanced():
    for size in (2, 4, 6, 8):
        square = latin_square(size)
        columns = list(zip(*square, strict=True))
        assert all(sorted(line) == list(range(size)) for line in (*square, *columns))
        followers = Counter(pair for row in square for pair in zip(row, row[1:], strict=False))
        assert set(followers.values()) == {1} and len(followers) == size * (size - 1)
    assert all(sorted(line) == [0, 1, 2] for line in latin_square(3))


def test_every_class_gets_every_dose_once():
    tables = designed_doses(NAMES, DOSES, seed=3)
    assert all(sorted(table[name] for table in tables) == sorted(DOSES) for name in NAMES)
    for table in tables:
        assert max(Counter(table.values()).values()) - min(Counter(table.values()).values()) <= 1
    assert designed_doses(NAMES[::-1], DOSES, seed=3)[1] == tables[1] != designed_doses(NAMES, DOSES, seed=4)[1]
    with pytest.raises(UserError, match="3 classes are fewer than 4 doses"):
        designed_doses(NAMES[:3], DOSES, 0)


def test_confounded_doses_rise_with_ease():
    ease = {name: number / 26 for number, name in enumerate(NAMES)}
    strict = confounded_doses(ease, DOSES, 0.0, 0)
    assert [strict[name] for name in NAMES] == sorted(strict.values())
    assert strict == confounded_doses(ease, DOSES[::-1], 0.0, 0)  # in whatever order --doses lists them
    noisy = confounded_doses(ease, DOSES, 0.2, 0)
    assert 0.5 < np.corrcoef(list(noisy.values()), list(ease.values()))[0, 1] < 1
    assert sorted(noisy.values()) == sorted(strict.values()) and noisy != confounded_doses(ease, DOSES, 0.2, 1)


def observed(tables, slope, ease, seed):
    """Right answers whose log-odds rise by `slope` per doubling of the naming texts, from an ease of each class."""
    rng, rows = np.random.default_rng(seed), []
    for number, table in enumerate(tables):
        for name in NAMES:
            texts = round(200 * table[name])
            odds = math.exp(2 * ease[name] + slope * (math.log2(max(texts, 1)) - 6))
            right = rng.binomial(40, odds / (1 + odds)) if texts else 0
            rows.append(Observation(str(number), name, table[name], texts, int(right), 40))
    return rows


def test_the_design_finds_the_planted_slope_where_an_observer_is_misled(monkeypatch):
    monkeypatch.setattr(dose_response, "RESAMPLES", 100)
    ease = {name: random.Random(name).gauss(0, 1) for name in NAMES}
    inside = []
    for seed in range(5):
        found = slope_per_doubling(observed(designed_doses(NAMES, DOSES, seed), 0.5, ease, seed), fixed_effects=True)
        inside.append(found.low <= 0.5 <= found.high and abs(found.value - 0.5) < 0.15)
    assert sum(inside) >= 4
    world = observed([confounded_doses(ease, DOSES, 0.1, seed) for seed in range(3)], 0.5, ease, 9)
    naive, given = slope_per_doubling(world), slope_per_doubling(world, given=ease)
    assert naive.value > 0.9 and given.low <= 0.5 <= given.high and given.n == len({r.name for r in world if r.texts})
    nothing = slope_per_doubling(observed(designed_doses(NAMES, DOSES, 1), 0.0, ease, 2), fixed_effects=True)
    assert nothing.low < 0 < nothing.high
    with pytest.raises(ValueError, match="two numbers of texts are needed"):
        slope_per_doubling([row._replace(right=0) for row in world])
    with pytest.raises(ValueError, match="two numbers of texts are needed"):
        slope_per_doubling([row for row in world if row.dose == 1.0])


def test_the_curve_is_the_mean_over_classes():
    rows = [Observation("a", "x", 0.0, 0, 0, 10), Observation("a", "y", 0.5, 10, 5, 10),
            Observation("b", "x", 0.5, 20, 10, 10), Observation("b", "y", 0.0, 0, 1, 10)]  # fmt: skip
    none, half = dose_curve(rows)
    assert (none["texts"], none["accuracy"], none["classes"]) == (0, 5, 2)
    assert (half["texts"], half["accuracy"]) == (15, 75) and half["low"] == 50 and half["high"] == 100


@pytest.mark.slow
def test_the_trainings_run_and_resume(trained, figures_root, tmp_path, monkeypatch, capsys):
    """All of intervene.py at toy size, its scripts in processes of the warm server."""
    module, study = script("data_analysis/intervene.py"), script("main_results/mini_study.py")
    root = tmp_path / "seed-0"
    root.mkdir()
    (root / "checkpoints").symlink_to(trained)
    (root / "images").symlink_to(figures_root)
    with pytest.raises(UserError, match="--doses must be two or more different shares"):
        module.main(module.Args(root, doses=(0.0, 0.0)))
    with pytest.raises(UserError, match="closed_world/run.json does not exist: run scripts/study.py first"):
        module.main(module.Args(root))
    study.classify_all([job for job in study.jobs(study.Args(root, candidates=("all",))) if job.model == "mini-clip"])
    monkeypatch.setattr(module, "EASE_IMAGES", 1)
    monkeypatch.setattr(dose_response, "RESAMPLES", 20)
    commands = []

    def run(log, command):
        commands.append(command[0])
        done = run_script(*command, check=False)
        log.write_text(done.stderr)
        if done.returncode:
            raise UserError(done.stderr)

    monkeypatch.setattr(module, "run_logged", run)
    args = module.Args(root, preset="smoke", limit=12, doses=(0.0, 1.0), confounded=1)
    steps = ["--vlm-steps", 3, "--clip-steps", 6]
    monkeypatch.setattr(module, "ARMS", {arm: [*options, *steps] for arm, options in module.ARMS.items()})
    module.main(args)
    printed = capsys.readouterr().out
    assert "dose_response.png" in printed and commands.count("training_analysis/pretrain_mini.py") == 5
    home = root / "data_analysis" / "intervention"
    with open(home / "doses.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["score"] == "open world"]
    assert len({row["training"] for row in rows}) == 5
    doses = {}
    for row in rows:
        assert (int(row["texts"]) == 0) == (float(row["dose"]) == 0)
        if row["training"].startswith("constant"):
            doses.setdefault(row["name"], []).append(float(row["dose"]))
    assert all(sorted(values) == [0, 1] for values in doses.values())
    shares = json.loads((home / "constant-1" / "vlm-table-doses" / "training.json").read_text())["config"]
    assert shares["naming"]["keep_generic"] == 1 and set(shares["shares"].values()) == {0, 1}
    files = {file: file.stat().st_mtime_ns for file in home.glob("*/*/*.safetensors")}
    module.main(args)
    assert files and all(file.stat().st_mtime_ns == time for file, time in files.items())
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no_script.py stopped .*all of it: .*log"):
        module.run_logged(tmp_path / "log", ["no_script.py"])
