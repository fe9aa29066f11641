"""Protects: what a new user does wrong ends with one sentence that says what is wrong, where, and what to do."""

import json

import pytest
from conftest import noise, run_script, script

from vlmclassifier import models
from vlmclassifier.benchmarks import BENCHMARKS, find_benchmark, load_evaluation
from vlmclassifier.models import MODELS, checkpoint_folder, find_model, hub_error
from vlmclassifier.records import UserError


@pytest.fixture
def classify(tiny):
    """classify_clip.py with a miniature, in this process."""
    module = script("main_results/classify_clip.py")

    def run(**options):
        module.main(module.Args("clip-vit-l-336", tiny / "clip-vit-l-336", **options))

    return run


def test_out_names_a_file(classify, own, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="--out .*taken is a file: give a folder for the run"):
        classify(out=tmp_path / "taken", **own.args)


def test_a_byte_order_mark_is_no_mistake(classify, own, tmp_path):
    own.manifest.write_bytes(b"\xef\xbb\xbf" + own.manifest.read_bytes())
    own.classes.write_bytes(b"\xef\xbb\xbf" + own.classes.read_bytes())
    classify(out=tmp_path / "run", **own.args)
    assert (tmp_path / "run" / "scores.csv").exists()


def test_files_that_are_no_manifest(own, tmp_path):
    (tmp_path / "a.csv").write_text("image,label\n0.png,cat\n")
    (tmp_path / "b.jsonl").write_text("image,label\n0.png,cat\n")
    for name, message in (
        ("a.csv", r"a.csv is no manifest: that is a file FILE.jsonl of JSON lines"),
        ("", r"is a folder: write its manifest with python scripts/prepare_data.py NAME --folder"),
        ("b.jsonl", r"b.jsonl row 1 is not JSON, the file looks like CSV: a manifest has lines"),
    ):
        with pytest.raises(UserError, match=message):
            load_evaluation(str(tmp_path / name), own.classes)
    with pytest.raises(UserError, match="The manifest .*none.jsonl does not exist"):
        find_benchmark(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"Unknown benchmark 'flower': did you mean 'flowers'\?"):
        find_benchmark("flower")
    with pytest.raises(UserError, match="Unknown benchmark 'xyzzy': Choose one of imagenet"):
        find_benchmark("xyzzy")


def test_rows_without_a_split(own):
    own.rows = [{key: value for key, value in row.items() if key != "split"} for row in own.rows]
    own.write()
    with pytest.raises(UserError, match=r"row 1 has no text under 'split': .* \(or give --split all\)"):
        load_evaluation(str(own.manifest), own.classes)
    assert len(load_evaluation(str(own.manifest), own.classes, split="all").examples) == 3


def test_one_candidate_and_an_empty_limit(own, classify, tiny):
    with pytest.raises(UserError, match="--candidates 1 is outside 2 to 2, the number of class names"):
        classify(candidates=("1",), **own.args)
    done = run_script("main_results/classify_clip.py", "--limit", "", check=False)
    assert done.returncode == 2 and "--limit" in done.stderr and "Traceback" not in done.stderr


def test_some_images_are_absent(own):
    (own.folder / "1.png").unlink()
    message = r"1 of 3 images do not exist \(2 do\), the first is .*1.png \(.* row 2\): put them there, or remove"
    with pytest.raises(UserError, match=message):
        load_evaluation(str(own.manifest), own.classes)
    with pytest.raises(UserError, match=r"3 of 3 images do not exist \(0 do\).* set --data-root"):
        load_evaluation(str(own.manifest), own.classes, own.folder.parent)


def test_a_label_that_is_in_no_list(own):
    for label, hint in (("dgo", "did you mean 'dog'?"), ("xyzzy", "fix the row, or add the class to the list")):
        own.rows[0]["label"] = label
        own.write()
        with pytest.raises(UserError) as error:
            load_evaluation(str(own.manifest), own.classes)
        assert f"the label {label!r} is not in the class list: {hint}" in str(error.value)


def test_the_class_list_beside_the_manifest_is_found(own):
    own.classes.rename(own.folder / "mine_classes.json")
    assert load_evaluation(str(own.manifest)).names == ("cat", "dog")


def test_a_file_for_another_architecture(own, tiny, tmp_path):
    module = script("main_results/classify_clip.py")
    weights = tiny / "clip-vit-l-336" / "open_clip_model.safetensors"
    with pytest.raises(UserError, match=r"do not load as ViT-B-32-laion2b_s34b_b79k .* fix --model, --weights"):
        module.main(module.Args("ViT-B-32/laion2b_s34b_b79k", weights, out=tmp_path / "run", **own.args))


def test_the_hub_is_offline_or_gated(monkeypatch, tmp_path):
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    spec = MODELS["llava-1.5-7b"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set, and it is not in the cache {tmp_path} \(HF_HOME\)"):
        checkpoint_folder(spec)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    gated = GatedRepoError.__new__(GatedRepoError)
    assert "it is gated: accept its licence on the hub and run hf auth login" in str(hub_error(spec, gated))
    absent = LocalEntryNotFoundError.__new__(LocalEntryNotFoundError)
    assert "LocalEntryNotFoundError): pass a local copy with --weights" in str(hub_error(spec, absent))


def test_a_latin_1_manifest_names_the_row(own):
    own.manifest.write_bytes(own.manifest.read_bytes() + b'{"image": "x.png", "label": "caf\xe9", "split": "test"}\n')
    with pytest.raises(UserError, match="mine.jsonl row 4 is not UTF-8 text .Latin-1 perhaps.: save .* as UTF-8"):
        load_evaluation(str(own.manifest), own.classes)


def test_a_model_folder_may_have_any_name(tiny, tmp_path, monkeypatch):
    """One that is called like a registered model has its prompt; paths.toml does not put another in its place."""
    folder = tmp_path / "llava-1.5-7b"
    folder.symlink_to(tiny / "llava-1.5-7b")
    monkeypatch.setattr(models, "local_path", lambda table, key: tiny / "llava-next-vicuna-7b")
    spec = find_model(str(folder), "vlm")
    assert (spec.template, spec.paper_name) == ("llava-1.5", "LLaVA1.5-7B") and checkpoint_folder(spec) == folder
    assert checkpoint_folder(MODELS["llava-1.5-7b"]) == tiny / "llava-next-vicuna-7b"
    other = tmp_path / "gpt-4-turbo"
    other.mkdir()
    assert find_model(str(other), "vlm").key == "gpt-4-turbo-folder"
    with pytest.raises(UserError, match=r"Unknown model 'llava-1.5-7': did you mean 'llava-1.5-7b'\?"):
        find_model("llava-1.5-7", "vlm")


def test_own_images_become_a_manifest(tmp_path, capsys):
    """Folders of any classes, split by the seed; and what is no data set."""
    module = script("scripts/prepare_data.py")
    for name in ("red_panda", "sea lion"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(5):
            noise((20, 10), number).save(tmp_path / "pictures" / name / f"{number}.png")
    module.main(module.Args("animals", folder=tmp_path / "pictures"))  # the manifest is written beside the images
    printed = capsys.readouterr().out
    assert (
        "animals: 10 rows (test 4, train 6) of 2 class names" in printed and "Classes: red panda, sea lion" in printed
    )
    task = load_evaluation(str(tmp_path / "pictures" / "animals.jsonl"))
    assert task.names == ("red panda", "sea lion") and len(task.examples) == 4 and task.tags == ()
    before = (tmp_path / "pictures" / "animals.jsonl").read_text()
    module.main(module.Args("animals", folder=tmp_path / "pictures", out=tmp_path / "pictures"))
    assert (tmp_path / "pictures" / "animals.jsonl").read_text() == before
    (tmp_path / "split" / "train").mkdir(parents=True)
    (tmp_path / "pictures").rename(tmp_path / "split" / "val")
    (tmp_path / "split" / "train").rmdir()
    module.main(module.Args("birds", folder=tmp_path / "split", out=tmp_path))
    assert "the validation images are the test split" in capsys.readouterr().out
    assert json.loads((tmp_path / "birds.jsonl").read_text().splitlines()[0])["image"] == "split/val/red_panda/0.png"
    (tmp_path / "split" / "val" / "Sea_Lion").mkdir()
    (tmp_path / "bad" / "empty").mkdir(parents=True)
    (tmp_path / "bad" / "full").mkdir()
    (tmp_path / "bad" / "full" / "0.png").write_bytes(b"")
    noise((9, 9)).save(tmp_path / "bad" / "full" / "1.png")
    with pytest.raises(UserError, match="has no image of the class 'empty': fill its folder, or remove it"):
        module.main(module.Args("birds", folder=tmp_path / "bad"))
    noise((9, 9)).save(tmp_path / "bad" / "empty" / "1.png")
    with pytest.raises(UserError, match="1 of 3 files are no images, the first is .*0.png: remove them"):
        module.main(module.Args("birds", folder=tmp_path / "bad"))
    for arguments, message in (
        ({"benchmark": "flower"}, r"flower is none of flowers, .* Did you mean flowers\?"),
        ({"benchmark": "a/b", "folder": tmp_path}, "'a/b' cannot name a data set"),
        ({"benchmark": "birds", "folder": tmp_path / "none"}, "is not a folder"),
        ({"benchmark": "birds", "folder": tmp_path / "split"}, "which are the same in words: merge or rename them"),
        ({"benchmark": "plane_figures", "folder": tmp_path}, "is drawn by scripts/make_plane_figures.py"),
    ):
        with pytest.raises(UserError, match=message):
            module.main(module.Args(**arguments))
    assert "animals" not in BENCHMARKS


def test_own_data_of_a_dataset_has_the_label_columns_names(tmp_path):
    from test_prepare_copies import write_parquet

    module = script("scripts/prepare_data.py")
    write_parquet(tmp_path / "copy" / "test-0.parquet", [1, 0, 1], ["red_panda", "sea lion"])
    module.main(module.Args("animals", dataset=str(tmp_path / "copy"), out=tmp_path, data_root=tmp_path))
    assert json.loads((tmp_path / "animals_classes.json").read_text()) == ["red panda", "sea lion"]
    labels = [json.loads(row)["label"] for row in (tmp_path / "animals.jsonl").read_text().splitlines()]
    assert labels == ["sea lion", "red panda", "sea lion"]
    write_parquet(tmp_path / "numbers" / "test-0.parquet", [1, 0, 1])
    with pytest.raises(UserError, match="holds numbers without names: give another --label-column"):
        module.main(module.Args("numbers", dataset=str(tmp_path / "numbers"), out=tmp_path))
