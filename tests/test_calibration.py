"""Protects: temperatures, calibration errors, coverage and the tree of classes, on worked cases and by enumeration."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
from conftest import noise, script

from vlmclassifier.records import UserError
from vlmclassifier.scoring import calibration as c
from vlmclassifier.scoring.hierarchy import hierarchical, hierarchy_of, make_hierarchy, read_hierarchy


def drawn(temperature, images=4_000, names=6):
    """Scores whose softmax at a temperature is the true distribution of the labels."""
    rng = np.random.default_rng(0)
    scores = rng.normal(scale=2.0, size=(images, names))
    probabilities = np.exp(c.log_softmax(scores, temperature))
    return scores, np.array([rng.choice(names, p=row) for row in probabilities])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    scores, truth = drawn(temperature)
    found = c.fit_temperature(scores, truth)
    assert found == pytest.approx(temperature, rel=0.08)
    losses = [c.mean_loss(scores, truth, found * factor) for factor in (0.98, 1.0, 1.02)]
    assert losses[1] == min(losses)
    confidence, right = c.confidences(scores, truth, found)
    assert c.calibration_error(confidence, right) < 2 * c.error_by_chance(confidence)
    if temperature != 1:
        assert c.calibration_error(*c.confidences(scores, truth)) > 4 * c.error_by_chance(confidence)


def test_rows_that_are_all_right_choose_no_temperature():
    scores, _ = drawn(1.0, images=20)
    with pytest.raises(UserError, match="No temperature from 0.02 to 50 fits the 20 train rows"):
        c.fit_temperature(scores, scores.argmax(axis=1))


def test_the_calibration_error_of_a_worked_case():
    """Four images at .95 of which three are right, one at .5 that is right: (4 x .2 + .5) / 5."""
    confidence, right = np.array([0.95, 0.95, 0.95, 0.95, 0.5]), np.array([True, True, True, False, True])
    assert c.calibration_error(confidence, right) == pytest.approx((4 * 0.2 + 0.5) / 5)
    bins = c.reliability(confidence, right)
    assert [(one.n, one.accuracy) for one in bins] == [(1, 1.0), (4, 0.75)] and bins[1].low == pytest.approx(14 / 15)
    assert c.calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0  # the ends have bins


@pytest.mark.parametrize("shift", [0.0, 0.06, 0.1, 0.2])
def test_the_interval_covers_the_true_calibration_error(shift, monkeypatch):
    """Models whose accuracy is their confidence minus a shift, which is then the error; 60 samples of 500 images."""
    monkeypatch.setattr(c, "RESAMPLES", 250)
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.25, 1, 500)
        low, high = c.error_interval(confidence, rng.random(500) < confidence - shift)
        covered += low <= shift <= high
    assert covered >= 52


def test_coverage_answers_equal_confidences_together():
    confidence = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    right = np.array([True, False, True, True, False])
    curve = c.coverage_curve(confidence, right)
    assert [(point.coverage, round(point.accuracy, 3)) for point in curve] == [
        (0.2, 1.0), (0.6, 0.667), (0.8, 0.75), (1.0, 0.6)
    ]  # fmt: skip
    assert c.coverage_at(curve, 0.7).coverage == 0.8 and c.coverage_at(curve, 0.9).threshold == 0.9
    assert c.coverage_at(c.coverage_curve(confidence, ~right | right & False), 0.95) is None
    kept = c.at_threshold(confidence, right, 0.75)
    assert (kept.coverage, kept.accuracy) == (0.6, pytest.approx(2 / 3))


TREE = {"parents": {"thing": [], "animal": ["thing"], "pet": ["thing"], "cat": ["animal", "pet"],
                    "dog": ["animal", "pet"], "wolf": ["animal"], "car": ["thing"]}}  # fmt: skip
CLASSES = ["cat", "dog", "wolf", "car"]


def tree(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps(TREE))
    return read_hierarchy(file, CLASSES)


def test_the_deepest_name_of_worked_cases(tmp_path):
    hierarchy = tree(tmp_path)
    probabilities = np.array([[0.6, 0.3, 0.05, 0.05], [0.4, 0.1, 0.45, 0.05], [0.3, 0.1, 0.05, 0.55]])
    names = [[hierarchy.nodes[place] for place in hierarchy.deepest(probabilities, certainty)]
             for certainty in (0.5, 0.9, 1.0)]  # fmt: skip
    # A class with two parents counts once below "thing". At .9 "pet" (.9) and "animal" (.95) are equally deep.
    assert names == [["cat", "animal", "car"], ["animal", "animal", "thing"], ["thing"] * 3]
    named = hierarchical(hierarchy, probabilities, np.array([1, 2, 3]), 0.5)
    assert (named.accuracy, named.leaf, named.classes) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 5 / 3)


def test_the_deepest_name_equals_an_enumeration(tmp_path):
    hierarchy = tree(tmp_path)

    def ancestors(node):
        return {node}.union(*(ancestors(parent) for parent in TREE["parents"][node]))

    def depth(node):
        return max((1 + depth(parent) for parent in TREE["parents"][node]), default=0)

    rng = np.random.default_rng(0)
    for probabilities, certainty in itertools.product(rng.dirichlet([0.4] * 4, size=100), (0.3, 0.6, 0.9)):
        sums = {node: sum(p for p, name in zip(probabilities, CLASSES, strict=True) if node in ancestors(name))
                for node in TREE["parents"]}  # fmt: skip
        allowed = [node for node in sums if sums[node] >= certainty or node == "thing"]
        best = max(allowed, key=lambda node: (depth(node), sums[node]))
        assert hierarchy.nodes[hierarchy.deepest(probabilities[None], certainty)[0]] == best


def test_trees_that_are_none(tmp_path):
    with pytest.raises(UserError, match="has no node of 'dog'"):
        make_hierarchy(["cat", "dog"], {"cat": "c"}, {"c": []})
    with pytest.raises(UserError, match="has the parent 'nothing', which it does not contain"):
        make_hierarchy(["cat"], {"cat": "c"}, {"c": ["nothing"]})
    with pytest.raises(UserError, match="has a circle at"):
        make_hierarchy(["cat"], {"cat": "c"}, {"c": ["d"], "d": ["c"]})
    file = tmp_path / "tree.json"
    file.write_text("[]")
    with pytest.raises(UserError, match="tree.json is no hierarchy"):
        read_hierarchy(file, ["cat"])
    two_roots = make_hierarchy(["cat", "car"], {"cat": "cat", "car": "car"}, {"cat": ["animal"], "animal": []})
    assert two_roots.nodes[0] == "any class" and two_roots.below[0].all()


def test_imagenet_and_plane_figures_have_trees(realdata):
    from vlmclassifier.benchmarks import class_names, find_benchmark

    names = list(dict.fromkeys(class_names(find_benchmark("imagenet"))))
    hierarchy = hierarchy_of("imagenet", names)
    assert hierarchy.names[hierarchy.nodes[0]] == "entity" and hierarchy.below[0].all()
    given = json.loads((realdata.parent / "labels" / "imagenet_hierarchy.json").read_text())
    assert {node: list(above) for node, above in hierarchy.parents.items()} == {
        node: value["parents"] for node, value in given["synsets"].items()
    }
    wnids = json.loads((realdata.parent / "labels" / "imagenet_wnids.json").read_text())
    of_class = dict(zip(reversed(class_names(find_benchmark("imagenet"))), reversed(wnids), strict=True))
    assert hierarchy.leaves == tuple(given["leaves"][of_class[name]] for name in names)
    figures = class_names(find_benchmark("plane_figures"))
    assert hierarchy_of("plane_figures", figures).depth["astroid"] == 2
    assert hierarchy_of("flowers", ["rose"]) is None


def test_runs_are_calibrated_on_their_train_runs(own, tiny, tmp_path, capsys):
    """CLIP's scores through classify_clip.py, with the temperature of the train split; test rows choose nothing."""
    classify, module = script("main_results/classify_clip.py"), script("inference_analysis/calibrate.py")
    common = {"model": "clip-vit-l-336", "weights": tiny / "clip-vit-l-336", **own.args}
    out = tmp_path / "main_results"
    with pytest.raises(UserError, match="No scores of all names below"):
        module.main(module.Args(tmp_path))
    with pytest.raises(UserError, match="add all to --candidates"):
        classify.main(classify.Args(save_scores=True, candidates=("2",), out=out / "no", **common))
    classify.main(classify.Args(save_scores=True, out=out / "clip", **common))
    found = c.read_name_scores(out / "clip")
    best = [json.loads(line)["ranking"][0] for line in (out / "clip" / "predictions.jsonl").read_text().splitlines()]
    assert found.scores.argmax(axis=1).tolist() == best and found.setting == "similarity"
    capsys.readouterr()
    with pytest.raises(UserError, match="can be calibrated: see above"):
        module.main(module.Args(tmp_path))
    assert "clip is left out: no run of the train split beside it" in capsys.readouterr().out
    rows = module.of_run(out / "clip", *fake_pair(found))
    assert rows["calibration"][0]["train_n"] == 400 and rows["calibration"][0]["n"] == 300
    assert rows["calibration"][0]["temperature"] == pytest.approx(2, rel=0.1)
    with pytest.raises(UserError, match="300 images are in its train run too, such as test 0"):
        module.of_run(out / "clip", fake_pair(found)[0], fake_pair(found)[0])


def test_a_run_is_paired_with_its_own_train_run(own, tiny, tmp_path):
    """Not with one of another model, caption, dtype or class list; the largest of several counts."""
    classify, module = script("main_results/classify_clip.py"), script("inference_analysis/calibrate.py")
    own.rows += [row | {"image": f"t{number}.png", "split": "train"} for number, row in enumerate(own.rows)]
    for number in range(3):
        noise((30, 20), number).save(own.folder / f"t{number}.png")
    own.write()
    out, common = tmp_path / "main_results", {"weights": tiny / "clip-vit-l-336", "save_scores": True, **own.args}
    classify.main(classify.Args("clip-vit-l-336", out=out / "test", **common))
    for name, limit in (("small", 2), ("large", None)):
        classify.main(classify.Args("clip-vit-l-336", out=out / "train" / name, split="train", limit=limit, **common))
    for key, value in (("model", "other"), ("caption", "{}"), ("dtype", "bfloat16"), ("classes", ["dog", "cat"])):
        decoy = out / "train" / f"decoy-{key}"
        shutil.copytree(out / "train" / "large", decoy)
        record = json.loads((decoy / "run.json").read_text())
        record["config"][key], record["rows"] = value, 99
        (decoy / "run.json").write_text(json.dumps(record))
    assert module.find_runs(tmp_path) == {out / "test": out / "train" / "large"}


def test_a_tree_of_other_classes_leaves_the_calibration(own, tmp_path, capsys):
    module = script("inference_analysis/calibrate.py")
    test, train = fake_pair(type("Found", (), {"config": {"model": "m", "benchmark": "b", "tags": [], "kind": "clip"}}))
    (tmp_path / "roses.json").write_text('{"parents": {"rose": []}}')
    rows = module.of_run(tmp_path / "main_results" / "run", test, train, tmp_path / "roses.json")
    assert rows["calibration"] and not rows["hierarchy"]
    assert "run gets no names of the tree: " in capsys.readouterr().out
    names = {f"class {number}": ["thing" if number % 2 else "animal"] for number in range(6)}
    (tmp_path / "tree.json").write_text(json.dumps({"parents": {"thing": [], "animal": [], **names}}))
    (row, *_) = module.of_run(tmp_path / "run", test, train, tmp_path / "tree.json")["hierarchy"]
    assert row["certainty"] == 50 and 50 < row["accuracy"] < 100 and 1 < row["classes"] < 6


def fake_pair(found):
    """Two sets of scores of six names, whose labels are drawn at temperature 2."""
    scores, truth = drawn(2.0, images=700)
    names = [f"class {number}" for number in range(6)]
    parts = (("test", slice(0, 300)), ("train", slice(300, 700)))
    return [
        c.NameScores(found.config, "similarity", [f"{split} {n}" for n in range(len(truth[part]))], names,
                     scores[part], truth[part]) for split, part in parts
    ]  # fmt: skip


def test_the_tables_hold_what_is_printed(own, tiny, tmp_path, capsys, monkeypatch):
    module = script("inference_analysis/calibrate.py")
    test, train = fake_pair(type("Found", (), {"config": {"model": "m", "benchmark": "b", "tags": [], "kind": "clip"}}))
    folders = {tmp_path / "t": tmp_path / "r"}
    monkeypatch.setattr(module, "find_runs", lambda outputs: folders)
    monkeypatch.setattr(c, "read_name_scores", lambda folder: test if folder.name == "t" else train)
    module.main(module.Args(tmp_path))
    printed = capsys.readouterr().out
    folder = tmp_path / "inference_analysis" / "calibration"
    with open(folder / "calibration.csv", newline="") as stream:
        row = next(csv.DictReader(stream))
    assert f"{float(row['ece_after']):.1f} [" in printed and float(row["ece_after"]) < float(row["ece_before"])
    assert {file.name for file in folder.iterdir()} == {"calibration.csv", "reliability.csv", "coverage.csv"}
    with open(folder / "reliability.csv", newline="") as stream:
        bins = [row for row in csv.DictReader(stream) if row["temperature"] == "after"]
    assert sum(int(row["n"]) for row in bins) == 300
