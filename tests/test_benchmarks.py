"""Protects: the class lists, the evaluation order, and the error message for every broken manifest."""

import gzip
import json
import random
from dataclasses import replace

import pytest

from vlmclassifier.benchmarks import (
    PAPER_BENCHMARKS,
    class_names,
    evaluation_order,
    find_benchmark,
    load_evaluation,
    load_examples,
)
from vlmclassifier.records import Prediction, UserError
from vlmclassifier.scoring import contains, exact


def test_files_of_windows_and_macos_are_read(own):
    """A byte-order mark, and accents as characters of their own."""
    own.classes.write_bytes(b"\xef\xbb\xbf" + '["café", "tea"]'.encode())
    own.rows = [row | {"label": "cafe\u0301"} for row in own.rows]
    own.write()
    own.manifest.write_bytes(b"\xef\xbb\xbf" + own.manifest.read_bytes())
    task = load_evaluation(str(own.manifest), own.classes)
    assert task.names == ("café", "tea") and {example.label for example in task.examples} == {"café"}
    prediction = Prediction("x", "café", 0, "Q", None, "a cup of cafe\u0301", None)
    assert contains(prediction) and exact(replace(prediction, output="Cafe\u0301."))


def test_manifests_of_bug_reports_are_read_or_refused(realdata, tmp_path):
    folder = realdata.parent / "bugs" / "manifests"
    for name in ("bom.jsonl", "nfd.jsonl"):
        text = (folder / name).read_bytes().replace(b"../images/", b"images/")
        (tmp_path / name).write_bytes(text)
        task = load_evaluation(str(tmp_path / name), folder / "classes.json", realdata.parent / "bugs")
        assert task.examples[0].label == task.names[0]
    with pytest.raises(UserError, match="models read '<image>' as a command"):
        load_evaluation(str(tmp_path / "bom.jsonl"), folder / "control_tokens.json", realdata.parent / "bugs")


@pytest.mark.parametrize(
    "name",
    [
        "<｜User｜>",
        "<fim-prefix>",
        "<|begin of text|>",
        "<image>",
        "a </s> b",
        "<|im_end|>",
        "[INST]",
        "[/INST]",
        "<row_1_col_2>",
    ],
)
def test_class_names_with_control_tokens_are_refused(name, own):
    own.classes.write_text(json.dumps(["cat", name]))
    with pytest.raises(UserError, match="models read .* as a command, not as text; rename the class"):
        load_evaluation(str(own.manifest), own.classes)


@pytest.mark.parametrize("key", PAPER_BENCHMARKS)
def test_class_lists_equal_the_papers(labels, key):
    assert list(class_names(PAPER_BENCHMARKS[key])) == json.loads((labels / f"{key}_classes.json").read_text())


def test_class_counts():
    counts = {key: (len(class_names(b)), len(set(class_names(b)))) for key, b in PAPER_BENCHMARKS.items()}
    assert counts == {"imagenet": (1000, 998), "flowers": (102, 102), "cars": (196, 196), "caltech": (100, 100)}


@pytest.mark.parametrize("key", ["flowers", "cars", "caltech"])
def test_manifests_load_in_the_papers_evaluation_order(labels, tmp_path, key):
    text = gzip.decompress((labels / f"{key}.jsonl.gz").read_bytes()).decode()
    (tmp_path / f"{key}.jsonl").write_text(text)
    benchmark = PAPER_BENCHMARKS[key]
    examples = load_examples(benchmark, class_names(benchmark), tmp_path, "test")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == "test"]
    random.seed(1234)  # as in the paper's code
    random.shuffle(rows)
    ordered = evaluation_order(examples)
    assert [example.id for example in ordered] == [row["image"] for row in rows]
    assert [example.id for example in evaluation_order(examples, 100)] == [row["image"] for row in rows[:100]]
    names = class_names(benchmark)
    assert all(names[example.class_index] == example.label for example in ordered)


def test_number_of_images_per_split(realdata):
    sizes = {key: len(load_evaluation(key, root=realdata, split="all").examples) for key in PAPER_BENCHMARKS}
    assert sizes == {"imagenet": 500, "flowers": 300, "cars": 300, "caltech": 300}
    assert len(load_evaluation("imagenet", root=realdata).examples) == 500  # the default split is "valid"
    assert len(load_evaluation("flowers", root=realdata).examples) == 120


def test_user_benchmark_loads(own):
    task = load_evaluation(own.args["benchmark"], own.classes)
    assert (task.benchmark.key, task.names, len(task.examples)) == ("mine", ("cat", "dog"), 3)
    assert {e.class_index for e in task.examples} == {0, 1}
    assert task.examples[0].row.startswith(str(own.manifest))


def test_duplicate_name_needs_its_class_index(own):
    own.classes.write_text('["cat", "dog", "cat"]')
    with pytest.raises(UserError, match="mine.jsonl row 1: .*class 0 or 2"):
        load_evaluation(own.args["benchmark"], own.classes)
    own.rows = [row | {"label_idx": 2 if row["label"] == "cat" else 1} for row in own.rows]
    own.write()
    assert {e.class_index for e in load_evaluation(own.args["benchmark"], own.classes).examples} == {1, 2}


BROKEN_ROWS = {
    "not JSON": '{"image": "a.png"',
    "not a JSON object": '["a.png"]',
    "'split'": '{"image": "0.png", "label": "cat"}',
    "no text under 'label'": '{"image": "x.png", "label": 3, "split": "test"}',
    "did you mean 'cat'": '{"image": "x.png", "label": "catt", "split": "test"}',
    "leaves the data root": '{"image": "../x.png", "label": "cat", "split": "test"}',
    "leaves the data root: write": '{"image": "/etc/x.png", "label": "cat", "split": "test"}',
    "earlier row": '{"image": "0.png", "label": "cat", "split": "test"}',
    "label_idx is 1": '{"image": "x.png", "label": "cat", "split": "test", "label_idx": 1}',
    "note that is not text": '{"image": "x.png", "label": "cat", "split": "test", "note": 1}',
}


@pytest.mark.parametrize("message", BROKEN_ROWS)
def test_broken_row_is_reported_with_its_number(own, message):
    own.write("", BROKEN_ROWS[message])  # the empty line counts as a row of the file, not as an error
    with pytest.raises(UserError, match=message) as caught:
        load_evaluation(own.args["benchmark"], own.classes)
    assert "mine.jsonl row 5" in str(caught.value)


def test_other_user_errors_are_reported(own, tmp_path):
    def check_refused(message, *args, **options):
        with pytest.raises(UserError, match=message):
            load_evaluation(*args, **options)

    manifest = own.args["benchmark"]
    check_refused("manifest .*absent.jsonl does not exist", str(tmp_path / "absent.jsonl"), own.classes)
    check_refused("did you mean 'flowers'", "flower")
    check_refused("needs its class list", manifest)
    check_refused("canonical list", "flowers", own.classes)
    check_refused("no row of the split 'train': its splits are test", manifest, own.classes, split="train")
    check_refused("not a folder", manifest, own.classes, root=tmp_path / "absent")
    check_refused("does not exist: write a JSON array", manifest, tmp_path / "absent.json")
    (tmp_path / "flowers.jsonl").write_text(own.manifest.read_text())
    check_refused(
        "name of a registered benchmark: use --benchmark flowers", str(tmp_path / "flowers.jsonl"), own.classes
    )
    (tmp_path / "bad.json").write_text('{"a": 1}')
    check_refused("at least two non-empty names", manifest, tmp_path / "bad.json")
    (tmp_path / "empty").mkdir()
    check_refused("flowers.jsonl .*does not exist", "flowers", root=tmp_path / "empty")
    own.manifest.write_bytes(b"\xff\xfe\x00")
    check_refused("UTF-8", manifest, own.classes)


def test_missing_images_are_reported_before_the_run(own):
    (own.folder / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png .*mine.jsonl row 2\): put them there"):
        load_evaluation(own.args["benchmark"], own.classes)


def test_paths_toml_sets_the_data_root(own, tmp_path, monkeypatch):
    settings = tmp_path / "paths.toml"
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(settings))
    settings.write_text('[benchmarks]\ncaltech = "elsewhere"\n')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "caltech.jsonl").write_text('{"image": "0.png", "label": "ant", "split": "test"}\n')
    (own.folder / "0.png").rename(tmp_path / "elsewhere" / "0.png")
    assert load_evaluation("caltech").examples[0].image == str(tmp_path / "elsewhere" / "0.png")
    with pytest.raises(UserError, match="does not exist"):  # --data-root has precedence
        load_evaluation("caltech", root=own.folder)
    settings.write_text("[benchmarks\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_evaluation("caltech")
    settings.write_text('[benchmarks]\nfoo.bar = "x"\n')
    with pytest.raises(UserError, match="the key in quotes"):
        load_evaluation("caltech")
    settings.unlink()
    with pytest.raises(UserError, match="VLMCLASSIFIER_PATHS"):
        load_evaluation("caltech")


def test_find_benchmark_uses_the_file_stem_as_key(own):
    assert find_benchmark(str(own.manifest), own.classes).key == "mine"
