"""Protects: manifests from third-party copies (parquet, the hub's layout, folders of images), and refused copies."""

import base64
import io
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace

import official
import pyarrow.parquet as pq
import pytest
from conftest import run_script, script
from PIL import Image as PILImage

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError
from vlmclassifier.scoring.class_facts import lemmas, synsets

SCRIPT = "scripts/prepare_data.py"
FLOWERS = class_names(BENCHMARKS["flowers"])
TORCHVISION_NAMES = {  # the paper's name -> torchvision's
    "globe flower": "globe-flower",
    "pink and yellow dahlia": "pink-yellow dahlia?",
    "air plant": "ball moss",
}


def prepare(benchmark, root, **options):
    module = script(SCRIPT)
    args = module.Args(benchmark, **({"out": root, "data_root": root} | options))
    module.main(args)
    return [json.loads(line) for line in (args.out / f"{benchmark}.jsonl").read_text().splitlines()]


def write_parquet(file, labels, names=None, image="image", label="label", png=(), first=0):
    """Write a parquet file as `datasets` does: images as bytes, the class names in its features.

    `image`, `label`: names of the columns. `png`: numbers of the rows with PNG images. `first`: number of the first
    JPEG image.
    """
    from datasets import ClassLabel, Dataset, Features, Image, Value

    images = []
    for number in range(len(labels)):
        data = official.jpeg(first + number)
        if number in png:
            stream = io.BytesIO()
            PILImage.open(io.BytesIO(data)).save(stream, "PNG")
            data = stream.getvalue()
        images.append({"bytes": data, "path": None})
    label_type = Value("string" if isinstance(labels[0], str) else "int64")
    if names:
        label_type = ClassLabel(names=list(names))
    features = Features({image: Image(), label: label_type})
    file.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({image: images, label: labels}, features).to_parquet(str(file))


def make_flowers_copy(folder):
    """Flowers102 with torchvision's names, one image per class in each official set. Returns the manifest's rows."""
    names = [TORCHVISION_NAMES.get(name, name) for name in FLOWERS]
    rows = []
    for copy_split, split in (("test", "test"), ("train", "train"), ("validation", "train")):
        write_parquet(folder / f"{copy_split}-00000-of-00001.parquet", list(range(102)), names, png=(3,))
        for number, name in enumerate(FLOWERS):
            suffix = "png" if number == 3 else "jpg"
            image = f"Flowers102/{copy_split}/{number:06}.{suffix}"
            rows.append({"image": image, "label": name, "split": split, "note": "not the paper's split"})
    return rows


def test_a_parquet_copy_gives_the_expected_manifest(tmp_path, capsys):
    expected = make_flowers_copy(tmp_path / "copy")
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    assert rows == expected and "No row had the split" not in capsys.readouterr().out
    assert (tmp_path / "Flowers102" / "test" / "000007.jpg").read_bytes() == official.jpeg(7)  # the stored bytes
    assert len(load_evaluation("flowers", root=tmp_path).examples) == 102
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jpg")}
    assert prepare("flowers", tmp_path, dataset=str(tmp_path / "copy")) == rows
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jpg")} == times  # no file is written again


def test_a_hub_repository_gives_the_same_manifest(tmp_path, monkeypatch):
    """The tests are offline: a stub of the library's function loads local files for the repository's name."""
    import datasets

    expected = make_flowers_copy(tmp_path / "copy")
    load_dataset = datasets.load_dataset
    files = {split: str(tmp_path / "copy" / f"{split}-*.parquet") for split in ("train", "validation", "test")}

    def load(name, **options):
        assert name == "owner/flowers" and not options
        return load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert prepare("flowers", tmp_path, dataset="owner/flowers") == expected


def test_one_file_without_splits_is_split_in_halves(tmp_path, capsys):
    folders = [name for names in official.CALTECH_FOLDERS.values() for name in names]
    names = [*folders, "BACKGROUND_Google", *class_names(BENCHMARKS["caltech"])]
    names = [name for name in names if name not in official.CALTECH_FOLDERS]
    write_parquet(tmp_path / "all.parquet", list(range(len(names))) * 2, names)
    rows = prepare("caltech", tmp_path, dataset=str(tmp_path / "all.parquet"))
    assert len(rows) == 2 * (len(names) - 1)  # the background is left out
    assert Counter(r["split"] for r in rows if r["label"] == "face") == {"train": 2, "test": 2}
    assert {r["note"] for r in rows} == {"not the paper's split"}
    printed = capsys.readouterr().out
    assert "No row had the split 'test': half of each class was drawn as the train split (--seed 0)." in printed


def test_a_copy_with_the_papers_counts_has_no_note(tmp_path, monkeypatch, capsys):
    make_flowers_copy(tmp_path / "copy")
    benchmark = replace(BENCHMARKS["flowers"], paper_rows={"train": 204, "test": 102})
    monkeypatch.setitem(BENCHMARKS, "flowers", benchmark)
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    assert not any("note" in row for row in rows)
    assert "same images in each split is not checked" in capsys.readouterr().out


def test_a_second_copy_does_not_overwrite_the_images_of_the_first(tmp_path):
    """Its images have the same file names, so the first manifest's labels would become wrong."""
    make_flowers_copy(tmp_path / "copy")
    prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    before = {file: file.read_bytes() for file in [*tmp_path.rglob("*.jpg"), tmp_path / "flowers.jsonl"]}
    write_parquet(tmp_path / "other" / "test.parquet", list(range(102)), FLOWERS, first=500)
    with pytest.raises(UserError, match="test/000000.jpg exists and is a different image .*: add --overwrite"):
        prepare("flowers", tmp_path, dataset=str(tmp_path / "other"))
    assert {file: file.read_bytes() for file in before} == before
    prepare("flowers", tmp_path, dataset=str(tmp_path / "other"), overwrite=True)
    assert (tmp_path / "Flowers102" / "test" / "000000.jpg").read_bytes() == official.jpeg(500)


def test_a_split_without_labels_is_skipped(tmp_path, capsys):
    """The hub has ImageNet's test set with -1 for every label."""
    write_parquet(tmp_path / "copy" / "validation.parquet", list(range(1000)), synsets())
    write_parquet(tmp_path / "copy" / "test.parquet", [-1] * 5, synsets())
    rows = prepare("imagenet", tmp_path, dataset=str(tmp_path / "copy"))
    assert [row["label_idx"] for row in rows] == list(range(1000))
    assert "split test has no labels and is skipped." in capsys.readouterr().out
    shutil.rmtree(tmp_path / "copy")
    file = tmp_path / "copy" / "a.parquet"
    write_parquet(file, [3, None], synsets())
    with pytest.raises(UserError, match="row 1 has no label although other rows have one"):
        prepare("imagenet", tmp_path / "new", dataset=str(tmp_path / "copy"))
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, table.schema.field(1), [[3, 1000]]), file)
    with pytest.raises(UserError, match="row 1 has the label 1000, but its column has 1000 classes"):
        prepare("imagenet", tmp_path / "new", dataset=str(tmp_path / "copy"))


def test_files_of_operating_systems_are_ignored(tmp_path):
    make_flowers_copy(tmp_path / "copy")
    (tmp_path / "copy" / "._test-00000-of-00001.parquet").write_bytes(b"metadata of macOS")
    assert len(prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))) == 306
    tree = tmp_path / "tree"
    make_class_folders(tree, [name.replace(" ", "_") for name in FLOWERS])
    for folder in (tree / "__MACOSX", tree / "rose" / ".ipynb_checkpoints", tree / "rose" / ".@__thumb"):
        folder.mkdir()
        (folder / "b.jpg").write_bytes(official.jpeg(1))
    assert len(prepare("flowers", tmp_path, folder=tree, overwrite=True)) == 204
    (tree / "rose" / "caf\udce9.jpg").write_bytes(official.jpeg(1))
    with pytest.raises(UserError, match="is not UTF-8 and cannot be written to a manifest: rename the file"):
        prepare("flowers", tmp_path, folder=tree, overwrite=True)


def test_columns_can_be_named_and_labels_can_be_text(tmp_path):
    cars = class_names(BENCHMARKS["cars"])
    write_parquet(
        tmp_path / "c" / "test.parquet", [official.official_car(name) for name in cars], None, "photo", "what"
    )
    with pytest.raises(UserError, match="has no label column among photo, what: name it with --label-column"):
        prepare("cars", tmp_path, dataset=str(tmp_path / "c"))
    rows = prepare("cars", tmp_path, dataset=str(tmp_path / "c"), label_column="what", image_column="photo")
    assert [row["label"] for row in rows] == list(cars) and {row["split"] for row in rows} == {"test"}


def test_columns_without_a_type_are_found_by_their_usual_names(tmp_path):
    from datasets import Dataset

    cars = class_names(BENCHMARKS["cars"])
    columns = {"picture": [official.jpeg(number) for number in range(len(cars))], "class": list(cars)}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "test.parquet"))
    rows = prepare("cars", tmp_path, dataset=str(tmp_path / "test.parquet"))
    assert [row["label"] for row in rows] == list(cars)


def test_imagenets_shared_names_are_resolved_by_their_order(tmp_path):
    finder = ClassFinder(BENCHMARKS["imagenet"], class_names(BENCHMARKS["imagenet"]))
    hub_names = [", ".join(names) for names in lemmas()]  # as on the hub: "tench, Tinca tinca"
    assert finder.find_all(hub_names, "x") == list(range(1000))
    assert finder.find_all(synsets()[::-1], "x") == list(range(999, -1, -1))  # WordNet ids are unique
    unique = []
    for name in hub_names:
        unique.append(f"{name}, again" if name in unique else name)
    write_parquet(tmp_path / "validation.parquet", list(range(1000)), unique)
    rows = prepare("imagenet", tmp_path, dataset=str(tmp_path / "validation.parquet"))
    assert {row["split"] for row in rows} == {"valid"} and [row["label_idx"] for row in rows] == list(range(1000))
    assert rows[5]["imagenet_label"] == synsets()[5]


def make_class_folders(folder, names):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        (folder / name / "b.jpg").write_bytes(official.jpeg(number))
        (folder / name / "a.PNG").write_bytes(official.jpeg(number))
        (folder / name / "notes.txt").write_text("not an image")
        (folder / name / "._b.jpg").write_text("not an image")


def test_a_folder_of_images_gives_the_expected_manifest(tmp_path):
    names = [name.replace(" ", "_") for name in FLOWERS]
    for split in ("train", "valid", "test"):
        make_class_folders(tmp_path / split, names)
    rows = prepare("flowers", tmp_path, folder=tmp_path)
    expected = []
    for split_folder, split in (("test", "test"), ("train", "train"), ("valid", "train")):
        for name, label in sorted(zip(names, FLOWERS, strict=True)):
            for file in ("a.PNG", "b.jpg"):
                image = f"{split_folder}/{name}/{file}"
                expected.append({"image": image, "label": label, "split": split, "note": "not the paper's split"})
    assert rows == expected
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "valid")
    shutil.copytree(tmp_path / "test", tmp_path / "plain")
    halves = prepare("flowers", tmp_path, folder=tmp_path / "plain", overwrite=True)
    assert Counter(row["split"] for row in halves) == {"train": 102, "test": 102}


def test_imagenets_folders_are_wordnet_ids(tmp_path):
    make_class_folders(tmp_path / "val", synsets())
    rows = prepare("imagenet", tmp_path, archives=tmp_path)
    assert rows[0] == {"image": "val/n01440764/a.PNG", "label": "tench", "split": "valid", "label_idx": 0,
                       "imagenet_label": "n01440764", "note": "not the paper's split"}  # fmt: skip
    assert len(rows) == 2000
    without_splits = prepare("imagenet", tmp_path, folder=tmp_path / "val", overwrite=True)
    assert [row["image"] for row in without_splits] == [row["image"] for row in rows]  # it is the validation set


def make_bad_copy(folder, defect):
    names = [TORCHVISION_NAMES.get(name, name) for name in FLOWERS]
    if defect == "numbers":  # one copy on the hub has them
        write_parquet(folder / "test.parquet", list(range(102)), [str(number) for number in range(102)])
    elif defect == "bare numbers":
        write_parquet(folder / "test.parquet", list(range(102)))
    elif defect == "fewer classes":
        write_parquet(folder / "test.parquet", list(range(101)), names[:101])
    elif defect == "no image of a class":
        write_parquet(folder / "test.parquet", [0] * 102, names)
    elif defect == "other names":
        write_parquet(folder / "test.parquet", list(range(102)), ["toaster", *names[1:]])
    elif defect == "no labels":
        write_parquet(folder / "test.parquet", ["x"] * 102, None, label="caption")
    elif defect == "broken file":
        folder.mkdir()
        (folder / "test.parquet").write_bytes(b"PAR1 and nothing else")
    elif defect == "overwritten data":
        write_parquet(folder / "test.parquet", list(range(102)), names)
        data = (folder / "test.parquet").read_bytes()
        middle = len(data) // 3  # the index at the end of the file is kept, the data is not
        (folder / "test.parquet").write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    elif defect in ("broken image", "bomb"):
        import datasets

        folder.mkdir()
        stream = io.BytesIO()
        PILImage.new("1", (20_000, 20_000)).save(stream, "PNG")
        data = b"not an image" if defect == "broken image" else stream.getvalue()
        table = datasets.Dataset.from_dict({"image": [data], "label": ["rose"]})
        table.to_parquet(str(folder / "test.parquet"))
    else:
        folder.mkdir()


ERRORS = {
    "numbers": "has the number 0 as a class name",
    "bare numbers": "has the number 0 as a class name",
    "fewer classes": "copy has 101 of the 102 classes of Flowers102",
    "no image of a class": "copy has 1 of the 102 classes",
    "other names": "has the class 'toaster', which is not a class of Flowers102",
    "no labels": "has no label column among image, caption: name it with --label-column",
    "broken file": "test.parquet cannot be loaded .*get it again, or remove it",
    "overwritten data": "cannot be read|is not an image",
    "broken image": "row 0 is not an image",
    "bomb": "row 0 is not an image .*decompression bomb",
    "no file": "contains no parquet file",
}


@pytest.mark.parametrize("defect", ERRORS)
def test_bad_copies_raise_an_error(tmp_path, defect):
    make_bad_copy(tmp_path / "copy", defect)
    with pytest.raises(UserError, match=ERRORS[defect]):
        prepare("flowers", tmp_path, dataset=str(tmp_path / "copy"))
    assert not (tmp_path / "flowers.jsonl").exists()


def test_a_parquet_file_without_the_columns_gives_no_traceback(tmp_path):
    make_bad_copy(tmp_path / "copy", "no labels")
    command = [SCRIPT, "flowers", "--dataset", tmp_path / "copy", "--out", tmp_path, "--data-root", tmp_path]
    done = run_script(*command, check=False)
    assert done.returncode == 1 and "name it with --label-column" in done.stderr and "Traceback" not in done.stderr
    done = run_script(*command, "--image-column", "photo", check=False)
    assert done.returncode == 1 and "has no column 'photo': --image-column must be one of image, caption" in done.stderr


def test_bad_folders_raise_an_error(tmp_path, labels):
    def refuse(message, **options):
        with pytest.raises(UserError, match=message):
            prepare("flowers", tmp_path / "root", **options)

    refuse("absent is not a folder", folder=tmp_path / "absent")
    refuse("exclude each other", folder=tmp_path, dataset="x")
    refuse("needs the official images", paper_manifests=labels, dataset="x")
    refuse("contains none of flowers.jsonl, flowers.jsonl.gz, data/flowers.jsonl,", paper_manifests=tmp_path)
    refuse("cannot be loaded", dataset="nobody/flowers")  # the tests are offline
    make_class_folders(tmp_path / "tree", [name.replace(" ", "_") for name in FLOWERS])
    refuse("is outside the data root", folder=tmp_path / "tree")
    shutil.rmtree(tmp_path / "tree" / "wallflower")
    refuse(
        "tree has 101 of the 102 classes of Flowers102; the first missing class is 'wallflower'",
        folder=tmp_path / "tree",
    )
    (tmp_path / "tree" / "test").mkdir()
    refuse("contains split folders .test. and another folder .*: give a folder", folder=tmp_path / "tree")
    (tmp_path / "flowers.jsonl").write_text('{"image": "a.jpg", "label": "toaster", "split": "test"}\n')
    options = {"paper_manifests": tmp_path, "archives": tmp_path / "x", "download": False}
    refuse("flowers.jsonl row 1: the label 'toaster'", **options)
    (tmp_path / "flowers.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "flowers.jsonl").unlink()
    refuse("cannot be read", **options)


def flowers_images():
    """One image per class as (bytes, name by torchvision)."""
    return [(official.jpeg(number), TORCHVISION_NAMES.get(name, name)) for number, name in enumerate(FLOWERS)]


def test_a_copy_of_save_to_disk_is_read(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    images, names = zip(*flowers_images(), strict=True)
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    columns = {"image": [{"bytes": data, "path": None} for data in images], "label": list(range(102))}
    table = Dataset.from_dict(columns, features)
    DatasetDict({"test": table, "train": table}).save_to_disk(tmp_path / "saved")
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "saved"))
    assert Counter(row["split"] for row in rows) == {"test": 102, "train": 102}
    assert [row["label"] for row in rows[:102]] == list(FLOWERS)
    assert (tmp_path / rows[5]["image"]).read_bytes() == official.jpeg(5)


def write_tar(file, entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in entries:
            information = tarfile.TarInfo(name)
            information.size = len(data)
            archive.addfile(information, io.BytesIO(data))


def test_webdataset_tars_are_read_with_their_class_names(tmp_path):
    """As CLIP_benchmark writes them; without the names a number identifies no class."""
    images, names = zip(*flowers_images(), strict=True)
    for split in ("train", "test"):
        entries = []
        for number, data in enumerate(images):
            entries += [(f"{number:04}.jpg", data), (f"{number:04}.cls", str(number).encode())]
        write_tar(tmp_path / "wds" / split / "0.tar", entries)
    with pytest.raises(UserError, match="the number 0 as a class name, which does not identify a class"):
        prepare("flowers", tmp_path, dataset=str(tmp_path / "wds"))
    (tmp_path / "wds" / "classnames.txt").write_text("\n".join(names) + "\n")
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "wds"))
    assert Counter(row["split"] for row in rows) == {"test": 102, "train": 102}
    assert [row["label"] for row in rows[:102]] == list(FLOWERS)
    assert (tmp_path / rows[7]["image"]).read_bytes() == official.jpeg(7)


def test_a_tsv_file_with_base64_images_is_read(tmp_path):
    lines = ["index\timage\tanswer"]
    lines += [f"{i}\t{base64.b64encode(data).decode()}\t{name}" for i, (data, name) in enumerate(flowers_images())]
    (tmp_path / "copy.tsv").write_text("\n".join(lines) + "\n")
    rows = prepare("flowers", tmp_path, dataset=str(tmp_path / "copy.tsv"))
    assert len(rows) == 102 and {row["label"] for row in rows} == set(FLOWERS)
    assert (tmp_path / rows[3]["image"]).read_bytes() == official.jpeg(3)
    (tmp_path / "copy.csv").write_text("a")
    with pytest.raises(UserError, match="copy.csv is none of"):
        prepare("flowers", tmp_path, dataset=str(tmp_path / "copy.csv"))


def test_kaggles_imagenet_is_read(tmp_path):
    """Flat validation images, whose classes are in LOC_val_solution.csv, and train images by WordNet id."""
    folder = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    lines = ["ImageId,PredictionString"]
    for number, wnid in enumerate(synsets()):
        lines.append(f"ILSVRC2012_val_{number + 1:08},{wnid} 1 2 3 4")
    (folder / "val").mkdir(parents=True)
    for number in range(1000):
        (folder / "val" / f"ILSVRC2012_val_{number + 1:08}.JPEG").write_bytes(b"")
    (folder / "train" / synsets()[7]).mkdir(parents=True)
    (folder / "train" / synsets()[7] / "a.JPEG").write_bytes(b"")
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    rows = prepare("imagenet", tmp_path, archives=tmp_path / "kaggle", download=False)
    assert Counter(row["split"] for row in rows) == {"valid": 1000, "train": 1}
    by_image = {row["image"].split("/")[-1]: row["label_idx"] for row in rows}
    assert by_image["ILSVRC2012_val_00000013.JPEG"] == 12 and by_image["a.JPEG"] == 7


def test_images_of_every_suffix_are_taken_and_others_are_named(tmp_path, capsys):
    """`--folder` dropped .jfif, .jpe, .tif, .tiff and .avif without a word."""
    for number, name in enumerate(FLOWERS):
        (tmp_path / "folder" / name).mkdir(parents=True)
        suffix = (".jfif", ".jpe", ".tif", ".tiff", ".avif", ".jp2", ".JPG")[number % 7]
        (tmp_path / "folder" / name / f"{number}{suffix}").write_bytes(official.jpeg(number))
    (tmp_path / "folder" / FLOWERS[0] / "notes.txt").write_text("no image")
    rows = prepare("flowers", tmp_path, folder=tmp_path / "folder")
    assert len(rows) == 102
    assert "1 files are not taken, such as notes.txt" in capsys.readouterr().err


def test_a_hub_caches_links_work_and_other_links_are_refused_before_the_manifest(tmp_path):
    cache = tmp_path / "datasets--x"
    (cache / "blobs").mkdir(parents=True)
    for number, name in enumerate(FLOWERS):
        (cache / "blobs" / str(number)).write_bytes(official.jpeg(number))
        folder = cache / "snapshots" / "main" / name
        folder.mkdir(parents=True)
        (folder / "a.jpg").symlink_to(cache / "blobs" / str(number))
    rows = prepare("flowers", cache, folder=cache / "snapshots" / "main", data_root=None)
    assert rows[0]["image"].startswith("snapshots/main/")
    assert len(load_evaluation("flowers", root=cache, split="all").examples) == 102
    (folder / "a.jpg").unlink()
    (tmp_path / "elsewhere.jpg").write_bytes(official.jpeg(1))
    (folder / "a.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (cache / "flowers.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.jpg is a link to .*elsewhere.jpg, which is outside .*trusted_roots"):
        prepare("flowers", cache, folder=cache / "snapshots" / "main", data_root=None)
    assert not (cache / "flowers.jsonl").exists()
