"""Protects: coefficients and intervals over classes are right, unmatched names are reported, real data's values."""

import csv
import json
import re

import numpy as np
import pytest
from conftest import script
from scipy import stats

from vlmclassifier.records import UserError
from vlmclassifier.scoring import correlation
from vlmclassifier.scoring.correlation import (
    binned_spearman,
    bins,
    correlate,
    equal_binned_spearman,
    equal_bins,
    logistic_slopes,
    partial_spearman,
    pearson,
    pearson_log,
    spearman,
)


def test_a_constant_does_not_correlate():
    large = np.full(5, 1e9 + 0.1)
    assert np.isnan(correlation.pearson(np.arange(5.0), large)) and np.isnan(correlation.pearson(large, np.arange(5.0)))
    assert correlation.pearson(1e-12 * np.arange(5), np.arange(5)) == pytest.approx(1)


def test_coefficients_equal_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 60).astype(float), rng.normal(size=60)  # with equal values
    assert abs(spearman(x, y) - stats.spearmanr(x, y).statistic) < 1e-12
    assert abs(pearson(x, y) - stats.pearsonr(x, y).statistic) < 1e-12
    assert abs(pearson_log(x, y) - stats.pearsonr(np.log10(1 + x), y).statistic) < 1e-12
    assert np.isnan(spearman(np.ones(5), y[:5]))
    # Of one other variable the partial coefficient has a closed form.
    z = x + rng.normal(size=60)
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert abs(partial_spearman(x, y, z) - expected) < 1e-9
    assert np.isnan(partial_spearman(x, y, x))  # nothing is left of x


def test_intervals_and_null_know_a_correlation_from_none(monkeypatch):
    monkeypatch.setattr(correlation, "RESAMPLES", 400)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1000, 150).astype(float)
    related, unrelated = x + rng.normal(scale=300, size=150), rng.normal(size=150)
    found = correlate(x, related, spearman)
    assert found.low > 0.4 and found.low < found.value < found.high and found.p < 0.01 and found.n == 150
    assert -0.3 < found.null_low < 0 < found.null_high < 0.3
    found = correlate(x, unrelated, spearman)
    assert found.low < 0 < found.high and found.p > 0.05
    with pytest.raises(ValueError, match="three classes"):
        correlate(x[:2], related[:2], spearman)


def test_bins_are_the_papers_and_hold_every_class():
    x = np.array([0, 9, 10, 99, 100, 999, 1000, 99_999, 100_000, 5e7])
    found = bins(x, np.arange(10.0))
    assert [(one.low, one.classes) for one in found if one.classes] == [
        (0, 2), (10, 1), (90, 1), (100, 2), (1_000, 1), (10_000, 1), (100_000, 1), (10_000_000, 1)
    ]  # fmt: skip
    assert found[0].accuracy == 0.5 and np.isnan(found[2].accuracy) and found[-1].high == np.inf
    assert [one.classes for one in equal_bins(x, np.arange(10.0), 4)] == [3, 3, 2, 2]
    rng = np.random.default_rng(3)
    x, y = 10 ** rng.uniform(0, 8, 80), rng.normal(size=80)
    for found, coefficient in ((bins(x, y), binned_spearman), (equal_bins(x, y, 10), equal_binned_spearman)):
        means = [one.accuracy for one in found if one.classes]
        assert abs(coefficient(x, y) - stats.spearmanr(range(len(means)), means).statistic) < 1e-12


def test_the_regression_finds_planted_slopes():
    """Log-odds per decade of two sources, with answers that vary more than independent ones."""
    rng = np.random.default_rng(2)
    n = np.full(400, 50.0)
    first, second = rng.uniform(0, 5, 400), rng.uniform(0, 5, 400)
    odds = -2 + 0.6 * first + 0.2 * second + rng.normal(scale=0.5, size=400)
    right = rng.binomial(50, 1 / (1 + np.exp(-odds)))
    slopes = {slope.predictor: slope for slope in logistic_slopes(right, n, {"first": first, "second": second})}
    assert slopes["first"].low < 0.57 < slopes["first"].high and slopes["second"].low < 0.19 < slopes["second"].high
    assert slopes["first"].dispersion > 1.5 and slopes["second"].low > 0
    with pytest.raises(ValueError, match="more classes than parameters"):
        logistic_slopes(right[:3], n[:3], {"first": first[:3], "second": second[:3]})


@pytest.mark.parametrize(
    "name, every, named, n",
    [("imagenet", 0.102, 0.067, 892), ("flowers", 0.256, 0.225, 86), ("caltech", 0.075, 0.047, 99)],
)
def test_real_counts_give_the_values_of_their_source(name, every, named, n, realdata, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(correlation, "RESAMPLES", 50)
    file = realdata.parent / "realfreq" / f"{name}.csv"
    rows = run(file, file, tmp_path, frequency_column=("laion400m_text", "cc12m_text"),
               accuracy_column="acc_ViT-L-14_laion400m", reference=file,
               reference_column="acc_RN50_yfcc15m")  # fmt: skip
    values = {(row["source"], row["classes"], row["statistic"]): row for row in rows}
    assert f"{float(values['laion400m_text', 'all', 'spearman']['value']):.3f}" == f"{every:.3f}"
    found = values["laion400m_text", "named", "spearman"]
    assert f"{float(found['value']):.3f}" == f"{named:.3f}" and int(found["n"]) == n
    assert ("cc12m_text", "all", "spearman_given_reference") in values
    printed = capsys.readouterr().out
    assert f" {every:.3f} " in printed and f" {named:.3f} " in printed and "classes are in" not in printed


def run(frequency, accuracy, tmp_path, **options):
    module = script("data_analysis/correlate.py")
    module.main(module.Args(frequency, accuracy, out=tmp_path / "out", **options))
    with open(tmp_path / "out" / "correlations.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def write(file, header, *rows):
    file.write_text("\n".join([header, *rows]) + "\n")
    return file


def test_tables_are_joined_and_names_without_a_partner_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(correlation, "RESAMPLES", 20)
    counts = write(tmp_path / "counts.csv", "class,stage,count,sentences",
                   *(f"{name},{stage},{n},99" for stage in ("a", "b", "total")
                     for n, name in enumerate(["cat", "Sea_lion", "yak", "dog", "emu"])))  # fmt: skip
    accuracies = write(tmp_path / "acc.csv", "class,accuracy,n,right", "cat,10,10,1", "sea lion,30,10,3", "yak,40,20,8",
                       "dog,80,10,8", "newt,1,10,0")  # fmt: skip
    rows = run(counts, accuracies, tmp_path)
    printed = capsys.readouterr().out
    assert "2 classes are in" in printed and "newt, sea lion" in printed and "Sea_lion, emu" in printed
    assert {row["source"] for row in rows} == {"a", "b", "total"} and {row["n"] for row in rows} >= {"3"}
    rows = run(counts, accuracies, tmp_path, match_spelling=True)
    assert "no regression on together: the predictors depend on each other" in capsys.readouterr().out
    assert next(row for row in rows if row["classes"] == "all")["n"] == "4"
    assert any(row["statistic"] == "spearman_given_images" for row in rows)
    assert (tmp_path / "out" / "slopes.csv").exists() and (tmp_path / "out" / "bins.csv").exists()
    with open(tmp_path / "out" / "unmatched.csv", newline="") as stream:
        assert {row["class"] for row in csv.DictReader(stream)} == {"newt", "emu"}
    other = write(tmp_path / "other.csv", "class,count", "x,1", "y,2", "z,3")
    cases = [
        ((other, accuracies, {}), "share 0 classes: they are of two class lists"),
        ((write(tmp_path / "b.csv", "name,count", "x,1"), accuracies, {}), "has no column 'class'; it has name, count"),
        ((write(tmp_path / "c.csv", "class,count", "cat,many"), accuracies, {}), "row 2: 'count' of 'cat' is no"),
        ((write(tmp_path / "d.csv", "class,count", "cat,1", "cat,2"), accuracies, {}), "has 'cat' twice"),
        ((counts, accuracies, {"frequency_column": ("more",)}), "has no column 'more'"),
        ((counts, other, {"accuracy_column": "count", "match_spelling": True}), "share 0 classes"),
        ((counts, write(tmp_path / "e.csv", "class,accuracy", "cat,300"), {}), "is no accuracy in percent"),
        ((counts, accuracies, {"reference": write(tmp_path / "f.csv", "class,accuracy", "cat,3")}), "no accuracy of"),
        ((write(tmp_path / "g.csv", "class,count", "sea_lion,1", "Sea lion,2"), accuracies, {"match_spelling": True}),
         "has 'sea lion' twice .or two spellings"),
        ((counts, write(tmp_path / "h.csv", "class,accuracy", "cat,1", "cat,2"), {}), "has 'cat' twice"),
        ((counts, accuracies, {"frequency_column": ("count", "sentences")}), "give one --frequency-column"),
        ((write(tmp_path / "i.csv", "class,stage,count", "cat,a,1", "cat,a,2"), accuracies, {}), "'cat' of 'a' tw"),
        ((write(tmp_path / "j.csv", "class,stage,count", "cat,a,1", "dog,b,2"), accuracies, {}), "count of 'cat' in"),
        ((write(tmp_path / "k.csv", "class,right", "cat,1"), accuracies, {"frequency_column": ("right",)}), "called"),
        ((write(tmp_path / "l.csv", "class,count", ",1"), accuracies, {}), "l.csv row 2 has no class"),
        ((counts, write(tmp_path / "m.csv", "class,accuracy,n", "cat,1,0"), {}), "is not above 0"),
    ]  # fmt: skip
    for (frequency, accuracy, options), message in cases:
        with pytest.raises(UserError, match=message):
            run(frequency, accuracy, tmp_path, **options)


def test_two_counting_rules_of_one_run_stand_side_by_side(tmp_path, monkeypatch, capsys):
    """Both are compared with the paper; other counts are not."""
    monkeypatch.setattr(correlation, "RESAMPLES", 20)
    module, table = script("data_analysis/correlate.py"), script("data_analysis/table.py")
    monkeypatch.setattr(module, "OUTPUTS", tmp_path / "out")
    (tmp_path / "r").mkdir()
    names = list("abcdefgh")
    accuracies = write(
        tmp_path / "flowers.csv", "class,accuracy,n,acc", *(f"{c},{9 * n},20,3" for n, c in enumerate(names))
    )
    model = {"model": "LLaVA1.5-7B", "tags": "", "setting": "open_world", "dataset": "flowers"}
    read = module.read_accuracy
    monkeypatch.setattr(module, "read_accuracy", lambda *given: (read(*given)[0], dict(model)))
    for folder, rules in ((tmp_path, "default"), (tmp_path / "r", "reference_rules"), (tmp_path / "r", "plurals")):
        counts = write(
            folder / f"{rules}.csv", "class,stage,count", *(f"{c},total,{n * n}" for n, c in enumerate(names))
        )
        counts.with_suffix(".json").write_text(json.dumps({"rules": rules}))
        module.main(module.Args(counts, accuracies))
    counts = write(tmp_path / "mine.csv", "class,count", *(f"{c},{n}" for n, c in enumerate(names)))
    module.main(module.Args(counts, accuracies))
    assert sorted(folder.name for folder in (tmp_path / "out" / "data_analysis").iterdir()) == [
        "flowers", "flowers-mine", "flowers-plurals", "flowers-reference_rules"
    ]  # fmt: skip
    capsys.readouterr()
    table.main(table.Args(tmp_path / "out" / "data_analysis"))
    printed = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| LLaVA1.5-7B ") and "flow" in line
    ]
    cells = {line.split("|")[4].strip(): line for line in printed}
    assert set(cells) >= {"default", "reference_rules", "plurals", "mine"}
    is_compared = {name: re.search(r"\[[^]]+\] \(0\.", line) is not None for name, line in cells.items()}
    assert is_compared["default"] and is_compared["reference_rules"]
    assert not is_compared["plurals"] and not is_compared["mine"]
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="mine.json does not say the rules of the counts"):
        module.main(module.Args(counts, accuracies))


def test_a_reference_has_its_own_number_of_images(tmp_path, monkeypatch):
    """The log-odds of its accuracy are smoothed by its own images, not by the run's."""
    monkeypatch.setattr(correlation, "RESAMPLES", 20)
    names = list("abcdefgh")
    counts = write(tmp_path / "counts.csv", "class,count", *(f"{c},{10**n}" for n, c in enumerate(names)))
    rows = [f"{c},{10 * n},20,{2 * n}" for n, c in enumerate(names)]
    accuracies = write(tmp_path / "acc.csv", "class,accuracy,n,right", *rows)
    seen = []
    monkeypatch.setattr(correlation, "log_odds", lambda accuracy, n: seen.append(n.tolist()) or accuracy)
    reference = write(tmp_path / "ref.csv", "class,accuracy,n", *(f"{c},{n},{5 + n}" for n, c in enumerate(names)))
    run(counts, accuracies, tmp_path, reference=reference)
    assert seen == [[5.0 + n for n in range(8)]]


def test_runs_of_every_kind_have_an_accuracy_by_class(tiny, own, tmp_path, monkeypatch):
    monkeypatch.setattr(correlation, "RESAMPLES", 20)
    own.classes.write_text(json.dumps(["cat", "dog", "yak"]))
    own.rows = [{"image": f"{i % 3}.png", "label": ["cat", "dog", "yak"][i], "split": "test"} for i in range(3)]
    own.write()
    clip, ranking = script("main_results/classify_clip.py"), script("inference_analysis/rank_labels.py")
    clip.main(clip.Args(weights=tiny / "clip-vit-l-336", out=tmp_path / "clip", **own.args))
    ranking.main(ranking.Args(weights=tiny / "llava-1.5-7b", out=tmp_path / "ranking", **own.args))
    counts = write(tmp_path / "counts.csv", "class,count", "cat,3", "dog,2", "yak,1")
    for folder in ("clip", "ranking"):
        rows = run(counts, tmp_path / folder, tmp_path, reference=tmp_path / "clip")
        assert rows[0]["n"] == "3" and rows[0]["tags"] and rows[0]["dataset"] == "mine"


def test_the_benchmark_of_the_intervals_runs(monkeypatch, capsys):
    monkeypatch.setattr(correlation, "RESAMPLES", 100)
    module = script("scripts/bench/bench_correlation.py")
    module.main(module.Args(draws=20, slopes=20, classes=40))
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["null_excludes_zero"] <= 0.35 and result["slope_coverage"] >= 0.7 and abs(result["slope_bias"]) < 0.2
