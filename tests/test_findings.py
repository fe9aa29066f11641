"""Protects: statistics and file of the findings, the table over seeds, and the folders of the study."""

import math

import numpy as np
import pytest
from conftest import ROOT, script

from vlmclassifier.mini.findings import (
    Finding,
    accuracy,
    over_seeds,
    read_findings,
    readable,
    verdict,
    without_paper,
    write_findings,
)
from vlmclassifier.records import UserError
from vlmclassifier.scoring.statistics import (
    error_ratio,
    error_ratio_slope,
    independent_difference,
    paired_difference,
    ratio_of_errors,
)


def test_differences_and_their_intervals():
    first, second = [True] * 60 + [False] * 40, [True] * 30 + [False] * 70
    paired = paired_difference(first, second)
    assert paired.value == pytest.approx(30) and paired.n == 100
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 100) * 100  # the differences are 30 ones and 70 zeros
    assert paired.low == pytest.approx(30 - spread, abs=1.5) and paired.high == pytest.approx(30 + spread, abs=1.5)
    independent = independent_difference(first, second)
    assert independent.value == pytest.approx(30) and independent.n == 200
    # Newcombe (1998), method 10: 56/70 - 48/80 = 0.2, interval 0.0524 to 0.3339
    newcombe = independent_difference([True] * 56 + [False] * 14, [True] * 48 + [False] * 32)
    assert (newcombe.low, newcombe.high) == (pytest.approx(5.24, abs=0.01), pytest.approx(33.39, abs=0.01))
    ratio = error_ratio(second, first)
    assert ratio.value == pytest.approx(70.5 / 40.5) and ratio.low < ratio.value < ratio.high
    assert error_ratio(first, [True] * 100).value == pytest.approx(40.5 / 0.5)
    with pytest.raises(UserError, match="no image for 'accuracy'"):
        accuracy("F1", "accuracy", [])


def test_a_written_file_is_read_back(tmp_path):
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


def test_several_seeds_show_the_range_and_count_the_verdicts():
    tables = [
        [
            Finding("F1", "gap", value, value - 1, value + 1, 100, 52.0, holds),
            Finding("F4", "not in every table", 1, 1, 1, 1),
        ]
        for value, holds in ((60.0, "holds"), (50.0, "holds"), (10.0, "does not hold"))
    ]
    tables[1].pop()
    (row,) = over_seeds(tables)
    assert (row.value, row.low, row.high, row.n, row.paper) == (40.0, 10.0, 60.0, 300, 52.0)
    assert row.holds == "holds in 2 of 3" and "smallest, largest" in readable([row], seeds=3)
    assert over_seeds(tables[:1]) == tables[0]


def test_the_folder_of_another_recipe_is_renamed_and_renamed_back(tmp_path):
    module = script("scripts/study.py")
    root = tmp_path / "seed-0"
    module.prepare_seed_folder(root, module.Args(), 0)
    (root / "result").write_text("first recipe")
    module.prepare_seed_folder(root, module.Args(), 0)
    assert (root / "result").read_text() == "first recipe"
    module.prepare_seed_folder(root, module.Args(preset="photos"), 0)
    assert not (root / "result").exists()
    (renamed,) = tmp_path.glob("seed-0.*")
    assert (renamed / "result").read_text() == "first recipe"
    module.prepare_seed_folder(root, module.Args(), 0)
    assert (root / "result").read_text() == "first recipe" and not renamed.exists()
    unrecorded = tmp_path / "seed-1"
    unrecorded.mkdir()
    (unrecorded / "file").write_text("made by hand")
    folder = module.prepare_seed_folder(unrecorded, module.Args(), 1)
    assert (folder / "file").exists()  # a folder without recipe.json is not renamed


@pytest.fixture
def main_study():
    """main_results/mini_study.py as a module."""
    return script("main_results/mini_study.py")


def made_up_hits(accuracy_of_class: dict[str, float]) -> dict[str, tuple[str, bool]]:
    """Hits of ten images of each class, the given share of them correct."""
    return {f"{n}{i}": (n, i < 10 * share) for n, share in accuracy_of_class.items() for i in range(10)}


def test_frequent_minus_rare_follows_the_naming_table(main_study):
    names = list("abcdef")
    naming = {"vlm": {n: {"share": 1 - k / 5} for k, n in enumerate(names)},
              "vlm-permuted": {n: {"share": 1 - (k + 2) % 6 / 5} for k, n in enumerate(names)}}  # fmt: skip
    hits = {
        ("clip", "all"): made_up_hits(dict.fromkeys(names, 1.0)),
        ("vlm", "none"): made_up_hits({"a": 1, "b": 0.8, "c": 0.5, "d": 0.3, "e": 0.1, "f": 0}),
        ("vlm-permuted", "none"): made_up_hits({"e": 1, "f": 0.8, "a": 0.5, "b": 0.3, "c": 0.1, "d": 0}),
        ("vlm-uniform", "none"): made_up_hits(dict.fromkeys(names, 0.9)),
    }
    rows = {row.metric: row for row in main_study.frequency(hits, naming)}
    assert rows["VLM, frequent third of the classes"].value == 90 and rows["VLM, rare third of the classes"].value == 5
    assert rows["VLM, frequent minus rare"].value == 85 and rows["CLIP, frequent minus rare"].value == 0
    assert rows["VLM, frequent minus rare"].holds == "holds (by construction)"
    controls = {row.metric.split(": ", 1)[1]: row for row in main_study.controls(hits, naming)}
    assert controls["CLIP minus VLM, every class always named"].value == pytest.approx(10)
    own_thirds = controls["frequencies permuted, frequent minus rare by its own thirds"]
    first_thirds = controls["frequencies permuted, frequent minus rare by the first VLM's thirds"]
    assert (own_thirds.value, own_thirds.holds) == (85, "holds")
    assert (first_thirds.value, first_thirds.holds) == (-50, "holds")
    same = {"vlm": {n: {"share": 1.0} for n in names}}
    assert main_study.frequency(hits, same) == []  # no frequent and rare classes to compare


def test_the_error_ratio_is_compared_between_few_and_many_candidates(main_study):
    hits = {("clip", k): made_up_hits({"a": share}) for k, share in (("2", 0.9), ("all", 0.5))}
    hits |= {("vlm", k): made_up_hits({"a": share}) for k, share in (("2", 0.2), ("all", 0.0))}
    *_, few, many, _ = main_study.lists(hits, ["2", "all"], 10)
    assert few.value > many.value and few.holds == "cannot be judged: CLIP errs 1 times" and not many.holds


def study_with_errors(main_study, images, shares):
    """The findings of VLM and CLIP with these shares of right answers by number of candidates."""
    hits = {}
    for count, (vlm, clip) in shares.items():
        for key, share in (("vlm", vlm), ("clip", clip)):
            hits[key, count] = {f"a{i:04}": ("a", (7 * i) % images < share * images) for i in range(images)}
    return {row.metric: row for row in main_study.lists(hits, list(shares), 100)}


def test_the_verdict_is_the_interval_of_the_slope_over_all_list_sizes(main_study):
    slope = "slope of the log error ratio on the log number of candidates"
    rising = {"2": (0.9, 0.99), "5": (0.7, 0.96), "20": (0.5, 0.9), "all": (0.3, 0.8)}  # 10, 7.5, 5 and 3.5 to 1
    assert study_with_errors(main_study, 1000, rising)[slope].holds == "holds"
    falling = {"2": (0.98, 0.99), "5": (0.9, 0.96), "20": (0.6, 0.9), "all": (0.1, 0.8)}
    assert study_with_errors(main_study, 1000, falling)[slope].holds == "does not hold"
    flat = {"2": (0.9, 0.97), "all": (0.5, 0.85)}
    assert study_with_errors(main_study, 200, flat)[slope].holds == "cannot be judged: the interval includes 0"
    perfect = {"2": (0.7, 1.0), "all": (0.3, 1.0)}
    rows = study_with_errors(main_study, 1000, perfect)
    assert rows[slope].holds.startswith("cannot be judged: CLIP errs 5 times or more at fewer than two")
    assert rows["VLM errors per CLIP error, 2 candidates"].holds.endswith("CLIP errs 0 times")
    merged = over_seeds([[Finding("F2", "x", 1, 0, 2, 9, None, holds)] for holds in ("holds", "cannot be judged: y")])
    assert merged[0].holds == "holds in 1 of 2, cannot be judged in 1"
    undecided = [[Finding("F2", "x", 1, 0, 2, 9, None, holds)] for holds in ("", "cannot be judged: y")]
    assert over_seeds(undecided)[0].holds == "cannot be judged in 1 of 2"


def test_numbers_of_one_kind_agree_everywhere(tmp_path):
    """Settings keep their decimals; the file's numbers round to what is printed; one formula for the ratio."""
    rows = [
        Finding("F2", "t of the guided sum, chosen on train images", 1.25, 1.25, 1.25, 9, 3.0),
        Finding("F1", "CLIP", 40.949, 36.649, 40.949, 9, 74.8),
    ]
    assert "| 1.25 " in readable(rows) and "40.9 [36.6, 40.9]" in readable(rows)
    write_findings(rows, tmp_path / "findings.csv")
    assert readable(read_findings(tmp_path / "findings.csv")) == readable(rows)
    assert [row.paper for row in without_paper(rows, "my")] == [None, None]
    assert without_paper(rows, "plane_figures") == rows
    assert "| paper " in readable(rows) and "paper" not in readable(without_paper(rows, "my"))
    model, reference = [True] * 90 + [False] * 10, [True] * 98 + [False] * 2
    assert error_ratio(model, reference).value == ratio_of_errors(10, 2)
    plots = (ROOT / "vlmclassifier" / "plotting" / "inference.py").read_text()
    assert "ratio_of_errors(errors[row], errors[clip])" in plots  # Figure 4


def test_the_interval_of_the_slope_covers_the_truth():
    """Independent errors at 2, 10 and 100 candidates with a true slope of 0; 100 simulations of 500 images."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        models = [rng.random(500) >= rate for rate in (0.15, 0.3, 0.6)]
        references = [rng.random(500) >= rate for rate in (0.05, 0.1, 0.2)]
        estimate = error_ratio_slope((2, 10, 100), models, references)
        covered += estimate.low <= 0 <= estimate.high
    assert covered >= 88


@pytest.mark.parametrize("reference_rate", [0.001, 0.003, 0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("factor", [1, 3, 30])
def test_the_interval_of_the_error_ratio_covers_the_truth(reference_rate, factor):
    """Simulated pairs of models that err on the same images more often than by chance; 300 tables of 1,000 images."""
    rng, images, rate = np.random.default_rng(0), 1000, min(0.8, factor * reference_rate)
    both = rate * reference_rate + 0.5 * (min(rate, reference_rate) - rate * reference_rate)
    covered = 0
    for _ in range(300):
        cells = rng.multinomial(images, [both, rate - both, reference_rate - both, 1 - rate - reference_rate + both])
        model = np.repeat([False, False, True, True], cells)
        reference = np.repeat([False, True, False, True], cells)
        estimate = error_ratio(model, reference)
        covered += estimate.low <= rate / reference_rate <= estimate.high
    assert covered / 300 >= 0.92  # a bootstrap's is 0.71 at an error of 0.1%


def test_the_mini_studies_run_on_trained_checkpoints(main_study, trained, figures_root, tmp_path, monkeypatch, capsys):
    """With every VLM in the folder; a second call reads the saved answers. CI runs them in two processes."""
    monkeypatch.setattr("vlmclassifier.mini.study.PROCESSES", 1)
    root = tmp_path / "seed-0"
    root.mkdir()
    (root / "images").symlink_to(figures_root)
    (root / "checkpoints").symlink_to(trained)
    args = main_study.Args(root, candidates=("2", "500"), limit=48, train=12)
    main_study.main(args)
    rows = read_findings(root / "main_results" / "findings.csv")
    text = (root / "main_results" / "findings.csv").read_text()
    assert {row.finding for row in rows} >= {"F1", "F2"} and any("all candidates" in row.metric for row in rows)
    assert {row.n for row in rows if row.finding == "F1"} == {48} and "500" not in text
    before = {file: file.stat().st_mtime_ns for file in root.glob("main_results/*/predictions.jsonl")}
    assert len(before) >= 5
    main_study.main(args)
    assert {file: file.stat().st_mtime_ns for file in root.glob("main_results/*/predictions.jsonl")} == before
    assert (root / "main_results" / "findings.csv").read_text() == text
    capsys.readouterr()
    inference = script("inference_analysis/mini_study.py")
    inference.main(inference.Args(root, limit=48, train=12))
    rows = {row.metric: row for row in read_findings(root / "inference_analysis" / "findings.csv")}
    for metric in ("largest change by a wording", "best training-free method minus open world",
                   "CLIP minus best training-free method", "guidance's gain over the sum"):  # fmt: skip
        verdicts = ("holds", "does not hold", "cannot be judged: no answer is right")  # of a model trained for a moment
        assert rows[metric].holds in verdicts and rows[metric].n == 48
    assert rows["VLM, ranking by the mean"].n == 48
    assert "Best training-free method on 12 train images" in capsys.readouterr().out
    assert (root / "inference_analysis" / "guidance.csv").stat().st_size > 1000
    features = script("feature_analysis/mini_study.py")
    features.main(features.Args(root, limit=48, train=288, draws=2))
    rows = {row.metric: row for row in read_findings(root / "feature_analysis" / "findings.csv")}
    assert rows["CLIP's probe minus the VLM's"].n == 48
    for control in ("random, mean of 2 draws", "permuted"):
        verdict = rows[f"VLM's probe minus the untrained control, {control}"].holds
        assert verdict in ("holds", "holds, but is passed through")
    for control in ("pixels, 16 x 16", "the language model before visual training"):
        assert rows[f"VLM's probe minus {control}"].n == 48
    table = script("feature_analysis/table.py")
    table.main(table.Args(outputs=root / "feature_analysis"))
    printed = capsys.readouterr().out
    assert "| untrained: random (seed 1)) | last_token-logistic" in printed.replace("mini-llava (miniature, ", "| ")
    assert "| centroid | text_behind_image |" in " ".join(printed.split())

    counting = script("data_analysis/mini_study.py")
    counting.main(counting.Args(root, limit=48))
    rows = {row.metric: row for row in read_findings(root / "data_analysis" / "findings.csv")}
    row = rows["Spearman, naming texts and VLM's accuracy"]
    assert row.paper == 0.76 and 3 <= row.n <= 48
    assert row.holds.startswith(("holds (by construction)", "does not hold", "cannot be judged"))
    assert rows["Spearman, naming texts and CLIP's accuracy"].paper == -0.13
    assert "| Spearman, naming texts and CLIP's accuracy" in capsys.readouterr().out


def test_a_study_with_only_the_list_of_all_names_has_the_usual_folders(main_study, tmp_path):
    """The scripts append -SETTING only to several settings of one call, so the study gives the full name of one."""
    jobs = main_study.jobs(main_study.Args(tmp_path, candidates=("all",)))
    clip, train = [job for job in jobs if job.model == "mini-clip"]
    assert clip.out.name == train.out.name == "mini-clip-closed_world" and clip.candidates == ("all",)
    assert train.out.parent.name == "train" and train.split == "train"
    jobs = main_study.jobs(main_study.Args(tmp_path, candidates=("2", "all")))
    assert [job.out.name for job in jobs if job.model == "mini-clip"] == ["mini-clip", "mini-clip-closed_world"]


def test_every_section_of_the_study_has_a_script():
    for section in script("scripts/study.py").SECTIONS:
        assert "--root" in (ROOT / section / "mini_study.py").read_text()
