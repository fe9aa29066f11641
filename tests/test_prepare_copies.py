"""Protects: manifests from other people's copies (parquet, the hub's layout, folders of pictures), and their traps."""

import io
import json
import shutil
from collections import Counter

import official
import pyarrow.parquet as pq
import pytest
from conftest import run_script, script
from PIL import Image as PILImage

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.preparing import manifests
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError
from vlmclassifier.scoring.special import lemmas, synsets

SCRIPT = "scripts/prepare_data.py"
FLOWERS = class_names(BENCHMARKS["flowers"])
TORCHVISION = {
    "globe flower": "globe-flower",
    "pink and yellow dahlia": "pink-yellow dahlia?",
    "air plant": "ball moss",
}


def prepare(benchmark, root, **options):
    module = script(SCRIPT)
    args = module.Args(benchmark, **({"out": root, "data_root": root} | options))
    module.main(args)
    return [json.loads(line) for line in (args.out / f"{benchmark}.jsonl").read_text().splitlines()]


def parquet(file, labels, names=None, image="image", label="label", png=(), first=0):
    """A parquet file as `datasets` writes it: pictures as bytes, the class names in its features."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    pictures = []
    for number in range(len(labels)):
        data = official.jpeg(first + number)
        if number in png:
            stream = io.BytesIO()
            PILImage.open(io.BytesIO(data)).save(stream, "PNG")
            data = stream.getvalue()
        pictures.append({"bytes": data, "path": None})
    kind = ClassLabel(names=list(names)) if names else Value("string" if isinstance(labels[0], str) else "int64")
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({image: pictures, label: labels}, Features({image: Image(), label: kind})).to_parquet(str(file))


def flower_copy(folder):
    """Flowers102 with torchvision's names: one picture a class in each of the three official sets."""
    names = [TORCHVISION.get(name, name) for name in FLOWERS]
    for split in ("train", "validation", "test"):
        parquet(folder / f"{split}-00000-of-00001.parquet", list(range(102)), names, png=(3,))
    return [
        {"image": f"Flowers102/{split}/{n:06}{'.png' if n == 3 else '.jpg'}", "label": FLOWERS[n],
         "split": "test" if split == "test" else "train", "note": "not the paper's split"}
        for split in ("test", "train", "validation") for n in range(102)
    ]  # fmt: skip


def test_a_parquet_copy_gives_the_hand_written_manifest(tmp_path, capsys):
    expected = flower_copy(tmp_path / "copy")
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    assert rows == expected and "No row had the split" not in capsys.readouterr().out
    assert (tmp_path / "Flowers102" / "test" / "000007.jpg").read_bytes() == official.jpeg(7)  # the bytes themselves
    assert len(load_evaluation("flowers", root=tmp_path).examples) == 102
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jpg")}
    assert prepare("flowers", tmp_path, dataset=str(tmp_path / "copy")) == rows
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jpg")} == times  # nothing is written twice


def test_a_hub_repository_gives_the_same_manifest(tmp_path, monkeypatch):
    """The hub is out of reach here: in its place the library loads local files under the repository's name."""
    import datasets

    expected, real = flower_copy(tmp_path / "copy"), datasets.load_dataset
    files = {split: str(tmp_path / "copy" / f"{split}-*.parquet") for split in ("train", "validation", "test")}

    def load(name, **options):
        assert name == "owner/flowers" and not options
        return real("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prepare("flowers", tmp_path, dataset="owner/flowers") == expected


def test_one_file_without_splits_is_halved(tmp_path, capsys):
    folders = [name for names in official.CALTECH_FOLDERS.values() for name in names]
    names = [*folders, "BACKGROUND_Google", *class_names(BENCHMARKS["caltech"])]
    names = [name for name in names if name not in official.CALTECH_FOLDERS]
    parquet(tmp_path / "all.parquet", list(range(len(names))) * 2, names)
    rows = prepare("caltech", tmp_path, dataset=str(tmp_path / "all.parquet"))
    assert len(rows) == 2 * (len(names) - 1)  # the background is left out
    assert Counter(r["split"] for r in rows if r["label"] == "face") == {"train": 2, "test": 2}
    assert {r["note"] for r in rows} == {"not the paper's split"}
    assert "No row had the split 'test': the splits above are ours (--seed 0)." in capsys.readouterr().out


def test_the_right_counts_of_a_copy_are_called_no_more_than_that(tmp_path, monkeypatch, capsys):
    flower_copy(tmp_path / "copy")
    monkeypatch.setattr(manifests, "PAPER_COUNTS", {"flowers": {"train": 204, "test": 102}})
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    assert not any("note" in row for row in rows) and "same pictures in its splits is not" in capsys.readouterr().out


def test_a_second_copy_does_not_take_the_pictures_of_the_first(tmp_path):
    """Its pictures would be written under the same names, and the first manifest's labels be wrong."""
    flower_copy(tmp_path / "copy")
    prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    before = {file: file.read_bytes() for file in [*tmp_path.rglob("*.jpg"), tmp_path / "flowers.jsonl"]}
    parquet(tmp_path / "other" / "test.parquet", list(range(102)), FLOWERS, first=500)
    with pytest.raises(UserError, match="test/000000.jpg is there and is another picture .*: add --overwrite"):
        prepare("flowers", tmp_path, dataset=str(tmp_path / "other"))
    assert {file: file.read_bytes() for file in before} == before
    prepare("flowers", tmp_path, dataset=str(tmp_path / "other"), overwrite=True)
    assert (tmp_path / "Flowers102" / "test" / "000000.jpg").read_bytes() == official.jpeg(500)


def test_a_split_without_labels_is_left_out(tmp_path, capsys):
    """The hub has ImageNet's test set with -1 for every label."""
    parquet(tmp_path / "copy" / "validation.parquet", list(range(1000)), synsets())
    parquet(tmp_path / "copy" / "test.parquet", [-1] * 5, synsets())
    rows = prepare("imagenet", tmp_path, dataset=str(tmp_path / "copy"))
    assert [row["label_idx"] for row in rows] == list(range(1000))
    assert "split test has no labels and is left out." in capsys.readouterr().out
    shutil.rmtree(tmp_path / "copy")
    file = tmp_path / "copy" / "a.parquet"
    parquet(file, [3, None], synsets())
    with pytest.raises(UserError, match="row 1 has no label, other rows have"):
        prepare("imagenet", tmp_path / "new", dataset=str(tmp_path / "copy"))
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, table.schema.field(1), [[3, 1000]]), file)
    with pytest.raises(UserError, match="row 1 has the label 1000, its column 1000 classes"):
        prepare("imagenet", tmp_path / "new", dataset=str(tmp_path / "copy"))


def test_what_systems_leave_behind_is_no_data(tmp_path):
    flower_copy(tmp_path / "copy")
    (tmp_path / "copy" / "._test-00000-of-00001.parquet").write_bytes(b"of macOS")
    assert len(prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))) == 306
    tree = tmp_path / "tree"
    class_tree(tree, [name.replace(" ", "_") for name in FLOWERS])
    for folder in (tree / "__MACOSX", tree / "rose" / ".ipynb_checkpoints", tree / "rose" / ".@__thumb"):
        folder.mkdir()
        (folder / "b.jpg").write_bytes(official.jpeg(1))
    assert len(prepare("flowers", tmp_path, folder=tree, overwrite=True)) == 204
    (tree / "rose" / "caf\udce9.jpg").write_bytes(official.jpeg(1))
    with pytest.raises(UserError, match="is not UTF-8 and would not fit a manifest: rename the file"):
        prepare("flowers", tmp_path, folder=tree, overwrite=True)


def test_columns_can_be_named_and_labels_be_text(tmp_path):
    cars = class_names(BENCHMARKS["cars"])
    parquet(tmp_path / "c" / "test.parquet", [official.official_car(name) for name in cars], None, "photo", "what")
    with pytest.raises(UserError, match="has no label column among photo, what: name it with --label-column"):
        prepare("cars", tmp_path, dataset=str(tmp_path / "c"))
    rows = prepare("cars", tmp_path, dataset=str(tmp_path / "c"), label_column="what", image_column="photo")
    assert [row["label"] for row in rows] == list(cars) and {row["split"] for row in rows} == {"test"}


def test_imagenets_shared_names_are_told_apart_by_their_order(tmp_path):
    finder = ClassFinder(BENCHMARKS["imagenet"], class_names(BENCHMARKS["imagenet"]))
    hub = [", ".join(names) for names in lemmas()]  # "tench, Tinca tinca": the hub's form
    assert finder.find_all(hub, "x") == list(range(1000))
    assert finder.find_all(synsets()[::-1], "x") == list(range(999, -1, -1))  # WordNet ids say it themselves
    unique = [name if name not in hub[:number] else f"{name}, again" for number, name in enumerate(hub)]
    parquet(tmp_path / "validation.parquet", list(range(1000)), unique)
    rows = prepare("imagenet", tmp_path, dataset=str(tmp_path / "validation.parquet"))
    assert {row["split"] for row in rows} == {"valid"} and [row["label_idx"] for row in rows] == list(range(1000))
    assert rows[5]["imagenet_label"] == synsets()[5]


def class_tree(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "b.jpg").write_bytes(official.jpeg(number))
        (folder / name / "a.PNG").write_bytes(official.jpeg(number))
        (folder / name / "notes.txt").write_text("no picture")
        (folder / name / "._b.jpg").write_text("no picture either")


def test_a_folder_of_pictures_gives_the_hand_written_manifest(tmp_path):
    names = [name.replace(" ", "_") for name in FLOWERS]
    for split in ("train", "valid", "test"):
        class_tree(tmp_path / split, names)
    rows = prepare("flowers", tmp_path, folder=tmp_path)
    expected = [
        {"image": f"{split}/{folder}/{file}", "label": label, "split": "test" if split == "test" else "train",
         "note": "not the paper's split"}
        for split in ("test", "train", "valid") for folder, label in sorted(zip(names, FLOWERS, strict=True))
        for file in ("a.PNG", "b.jpg")
    ]  # fmt: skip
    assert rows == expected
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "valid")
    shutil.copytree(tmp_path / "test", tmp_path / "plain")
    halves = prepare("flowers", tmp_path, folder=tmp_path / "plain", overwrite=True)
    assert Counter(row["split"] for row in halves) == {"train": 102, "test": 102}


def test_imagenets_folders_are_wordnet_ids(tmp_path):
    class_tree(tmp_path / "val", synsets())
    rows = prepare("imagenet", tmp_path, archives=tmp_path)
    assert rows[0] == {"image": "val/n01440764/a.PNG", "label": "tench", "split": "valid", "label_idx": 0,
                       "imagenet_label": "n01440764", "note": "not the paper's split"}  # fmt: skip
    assert len(rows) == 2000
    assert [row["image"] for row in prepare("imagenet", tmp_path, folder=tmp_path / "val", overwrite=True)] == [
        row["image"] for row in rows
    ]  # a folder without splits is the validation set


def bad_copies(folder, how):
    names = [TORCHVISION.get(name, name) for name in FLOWERS]
    if how == "numbers":  # the hub copy with other splits
        parquet(folder / "test.parquet", list(range(102)), [str(number) for number in range(102)])
    elif how == "bare numbers":
        parquet(folder / "test.parquet", list(range(102)))
    elif how == "fewer classes":
        parquet(folder / "test.parquet", list(range(101)), names[:101])
    elif how == "no picture of a class":
        parquet(folder / "test.parquet", [0] * 102, names)
    elif how == "other names":
        parquet(folder / "test.parquet", list(range(102)), ["toaster", *names[1:]])
    elif how == "no pictures":
        parquet(folder / "test.parquet", list(range(102)), names, image="url")
    elif how == "no labels":
        parquet(folder / "test.parquet", ["x"] * 102, None, label="caption")
    elif how == "broken file":
        folder.mkdir()
        (folder / "test.parquet").write_bytes(b"PAR1 but no more")
    elif how == "cut short":
        parquet(folder / "test.parquet", list(range(102)), names)
        data = (folder / "test.parquet").read_bytes()
        middle = len(data) // 3  # the index at the end is whole, what it points to is not
        (folder / "test.parquet").write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    elif how in ("broken picture", "bomb"):
        import datasets

        stream = io.BytesIO()
        PILImage.new("1", (20_000, 20_000)).save(stream, "PNG")
        data = b"no picture" if how == "broken picture" else stream.getvalue()
        table = datasets.Dataset.from_dict({"image": [data], "label": ["rose"]})
        table.to_parquet(str(folder / "test.parquet"))
    else:
        folder.mkdir()


BAD = {
    "numbers": "has the number 0 for a class name",
    "bare numbers": "has the number 0 for a class name",
    "fewer classes": "copy has 101 of the 102 classes of Flowers102",
    "no picture of a class": "copy has 1 of the 102 classes",
    "other names": "has the class 'toaster', which is none of Flowers102's",
    "no labels": "has no label column among image, caption: name it with --label-column",
    "broken file": "test.parquet cannot be loaded .*get it again, or remove it",
    "cut short": "cannot be read|is not a picture",
    "broken picture": "row 0 is not a picture",
    "bomb": "row 0 is not a picture .*decompression bomb",
    "nothing": "holds no parquet file",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_copies_end_in_a_sentence(tmp_path, how):
    (tmp_path / "copy").mkdir()
    if how in ("broken file", "nothing"):
        (tmp_path / "copy").rmdir()
    bad_copies(tmp_path / "copy", how)
    with pytest.raises(UserError, match=BAD[how]):
        prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    assert not (tmp_path / "flowers.jsonl").exists()


def test_a_parquet_without_the_columns_is_no_traceback(tmp_path):
    bad_copies(tmp_path / "copy", "no labels")
    words = [SCRIPT, "flowers", "--dataset", tmp_path / "copy", "--out", tmp_path, "--data-root", tmp_path]
    done = run_script(*words, check=False)
    assert done.returncode == 1 and "name it with --label-column" in done.stderr and "Traceback" not in done.stderr
    done = run_script(*words, "--image-column", "photo", check=False)
    assert done.returncode == 1 and "has no column 'photo': --image-column must be one of image, caption" in done.stderr


def test_bad_folders_end_in_a_sentence(tmp_path, labels):
    def refuse(words, benchmark="flowers", **options):
        with pytest.raises(UserError, match=words):
            prepare(benchmark, tmp_path / "root", **options)

    refuse("absent is not a folder", folder=tmp_path / "absent")
    refuse("three sources", folder=tmp_path, dataset="x")
    refuse("goes with the official pictures", paper_manifests=labels, dataset="x")
    refuse("holds neither flowers.jsonl nor", paper_manifests=tmp_path)
    refuse("cannot be loaded", dataset="nobody/flowers")  # offline here
    class_tree(tmp_path / "tree", [name.replace(" ", "_") for name in FLOWERS])
    refuse("lies outside of the data root", folder=tmp_path / "tree")
    shutil.rmtree(tmp_path / "tree" / "wallflower")
    refuse("tree has 101 of the 102 classes of Flowers102; 'wallflower' is missing", folder=tmp_path / "tree")
    (tmp_path / "tree" / "test").mkdir()
    refuse("holds splits .test. beside", folder=tmp_path / "tree")
    (tmp_path / "flowers.jsonl").write_text('{"image": "a.jpg", "label": "toaster", "split": "test"}\n')
    refuse(
        "flowers.jsonl row 1: the label 'toaster'", paper_manifests=tmp_path, archives=tmp_path / "x", download=False
    )
    (tmp_path / "flowers.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "flowers.jsonl").unlink()
    refuse("cannot be read", paper_manifests=tmp_path, archives=tmp_path / "x", download=False)
