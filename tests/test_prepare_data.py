"""Protects: manifests from the official archives: the right rows, safe unpacking, every file checked."""

import errno
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import official
import pytest
from conftest import run_script, script
from official import prepare, read_manifest
from scipy.io import savemat

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.preparing import official as layouts
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError

SCRIPT = "scripts/prepare_data.py"


def without_note(rows):
    return [{key: value for key, value in row.items() if key != "note"} for row in rows]


@pytest.mark.parametrize("key", official.MAKERS)
def test_official_archives_give_the_expected_manifest(tmp_path, key):
    expected = official.MAKERS[key](tmp_path)
    rows = prepare(key, tmp_path)
    assert without_note(rows) == expected
    assert {row["note"] for row in rows} == {"not the paper's split"}
    assert json.loads((tmp_path / "out" / f"{key}_classes.json").read_text()) == list(class_names(BENCHMARKS[key]))
    first = (tmp_path / "out" / f"{key}.jsonl").read_bytes()
    for archive in [*tmp_path.glob("*.t*gz"), *tmp_path.glob("*.tar")]:
        archive.unlink()  # the unpacked files are enough
    prepare(key, tmp_path)
    assert (tmp_path / "out" / f"{key}.jsonl").read_bytes() == first


def test_caltech_without_the_papers_manifest_is_split_in_seeded_halves(tmp_path):
    expected = official.make_caltech(tmp_path)
    rows = prepare("caltech", tmp_path)
    assert [{"image": r["image"], "label": r["label"]} for r in rows] == expected
    halves = {label: Counter(r["split"] for r in rows if r["label"] == label) for label in ("face", "leopard")}
    assert halves == {"face": {"train": 2, "test": 2}, "leopard": {"train": 1, "test": 1}}
    assert {row["note"] for row in rows} == {"not the paper's split"}
    same = prepare("caltech", tmp_path, overwrite=True)
    other = prepare("caltech", tmp_path, overwrite=True, seed=1)
    assert same == rows and Counter(r["split"] for r in other) == Counter(r["split"] for r in rows) and other != rows
    removed = sorted((tmp_path / "101_ObjectCategories").glob("*/image_0002.jpg"))[1:30]
    for path in removed:
        path.unlink()
    split_of = {row["image"]: row["split"] for row in prepare("caltech", tmp_path, overwrite=True)}
    changed_folders = {path.parent.name for path in removed}
    unchanged = [r for r in rows if r["image"].split("/")[1] not in changed_folders]
    assert len(unchanged) > 100 and all(split_of[r["image"]] == r["split"] for r in unchanged)
    single_folders = changed_folders - {"Faces", "Faces_easy"}  # one image is left in each of these classes
    single_splits = [split for image, split in split_of.items() if image.split("/")[1] in single_folders]
    assert len(single_splits) > 20 and set(single_splits) == {"train"}  # an odd image is in the train split


def test_only_the_papers_rows_have_no_note(tmp_path, monkeypatch, capsys):
    """The right counts are not enough for official files, whose names identify the images."""
    counts = {"flowers": {"train": 204, "test": 102}, "caltech": {"train": 101, "test": 101}}
    for key, make in (("flowers", official.make_flowers), ("caltech", official.make_caltech)):
        monkeypatch.setitem(BENCHMARKS, key, replace(BENCHMARKS[key], paper_rows=counts[key]))
        rows = make(tmp_path / key)
        assert {row["note"] for row in prepare(key, tmp_path / key)} == {"not the paper's split"}
        if key == "flowers":
            assert "some images have a different label or split" in capsys.readouterr().out
        else:
            assert "the counts are the paper's, but the splits are not" in capsys.readouterr().out
            rows = prepare(key, tmp_path / key)
        lines = []
        for row in rows:
            name = "/".join(row["image"].split("/")[-2:])
            lines.append(f"{name}\t{row['label']}\t{row['split']}\n")
        digest = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
        monkeypatch.setitem(BENCHMARKS, key, replace(BENCHMARKS[key], paper_rows_sha256=digest))
        assert not any("note" in row for row in prepare(key, tmp_path / key, overwrite=True))
        assert "the same images with the same labels" in capsys.readouterr().out


def test_halves_of_the_cars_have_the_papers_counts_but_not_its_split(tmp_path, labels, capsys):
    """Half of each class, rounded up, is 8,144 images in total: the counts alone would say "as in the paper"."""
    with gzip.open(labels / "cars.jsonl.gz", "rt") as stream:
        class_counts = Counter(json.loads(line)["label"] for line in stream)
    for name, count in class_counts.items():
        folder = tmp_path / "cars" / official.official_car(name).replace("/", "-")
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:05}.jpg").touch()
    rows = prepare("cars", tmp_path, archives=None, folder=tmp_path / "cars")
    assert Counter(row["split"] for row in rows) == {"train": 8_144, "test": 8_041}
    assert {row["note"] for row in rows} == {"not the paper's split"}
    assert "half of each class was drawn as the train split (--seed 0)" in capsys.readouterr().out


def test_changed_copies_of_the_papers_manifest_are_detected(tmp_path, labels, capsys):
    with gzip.open(labels / "caltech.jsonl.gz", "rt") as stream:
        paper_rows = [json.loads(line) for line in stream]
    folder = tmp_path / "paper"
    folder.mkdir()

    def prepare_rows(rows):
        (folder / "caltech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare("caltech", tmp_path, paper_manifests=folder, overwrite=True)

    assert not any("note" in row for row in prepare_rows(paper_rows[::-1]))  # the order does not matter
    first, last = paper_rows[0], paper_rows[-1]
    swapped = [first | {"label": last["label"]}, *paper_rows[1:-1], last | {"label": first["label"]}]
    assert first["label"] != last["label"] and all("note" in row for row in prepare_rows(swapped))
    with pytest.raises(UserError, match='row 1 has the note "not the paper\'s split"'):
        prepare_rows([row | {"note": "not the paper's split"} for row in paper_rows])
    for wrong in (4, "3", 5000, 3.0):
        with pytest.raises(UserError, match=f"row 2: the label 'accordion' is class 3, but label_idx is {wrong}"):
            prepare_rows([first, paper_rows[1] | {"label": "accordion", "label_idx": wrong}])
    with pytest.raises(UserError, match="row 1: the label 'toaster' is not in the class list"):
        prepare_rows([first | {"label": "toaster"}])
    with pytest.raises(UserError, match="has no rows"):
        prepare_rows([])
    with pytest.raises(UserError, match="the image path ./data/Caltech101 has no file name"):
        prepare_rows([first | {"image": "./data/Caltech101"}])


@pytest.mark.parametrize(
    ("key", "subfolder"), [("flowers", "flowers-102"), ("cars", "stanford_cars"), ("caltech", "caltech101")]
)
def test_torchvisions_layout_is_used_as_it_is(tmp_path, key, subfolder):
    """The files that torchvision's own classes read, without the archives."""
    folder = tmp_path / subfolder
    folder.mkdir()
    rows = official.make_caltech(folder) if key == "caltech" else official.MAKERS[key](folder)
    from_subfolder = prepare(key, folder)
    for archive in [*folder.glob("*.t*gz"), *folder.glob("*.zip")]:
        archive.unlink()
    from_parent = prepare(key, tmp_path)  # the folder that torchvision calls `root`
    assert [row | {"image": f"{subfolder}/{row['image']}"} for row in from_subfolder] == from_parent
    assert len(from_parent) == len(rows)


def test_torchvision_reads_the_same_flowers(tmp_path, monkeypatch):
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    official.make_flowers(folder)
    rows = prepare("flowers", tmp_path)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)  # the small files have other checksums
    dataset = Flowers102(str(tmp_path), split="test")
    names = class_names(BENCHMARKS["flowers"])
    expected = []
    for file, label in zip(dataset._image_files, dataset._labels, strict=True):
        expected.append((str(file.relative_to(tmp_path)), names[label]))
    assert [(row["image"], row["label"]) for row in rows if row["split"] == "test"] == expected


COUNTS = {
    "flowers": (8_189, {"train": 2_040, "test": 6_149}),
    "cars": (16_185, {"train": 8_144, "test": 8_041}),
    "caltech": (8_677, {"train": 4_346, "test": 4_331}),
}


@pytest.mark.parametrize("key", COUNTS)
def test_the_papers_manifests_are_used(tmp_path, labels, key, capsys):
    rows = prepare(key, tmp_path, paper_manifests=labels)
    count, splits = COUNTS[key]
    assert len(rows) == count and Counter(row["split"] for row in rows) == splits
    printed = capsys.readouterr().out
    assert "As in the paper: the same images" in printed
    assert f"{count:,} of the {count:,} images do not exist yet" in printed
    assert not any("note" in row for row in rows)
    with gzip.open(labels / f"{key}.jsonl.gz", "rt") as stream:
        paper_rows = [json.loads(line) for line in stream]
    prefix = f"./data/{BENCHMARKS[key].title}/"
    assert [row | {"image": prefix + row["image"]} for row in rows] == paper_rows
    assert json.loads((tmp_path / "out" / f"{key}_classes.json").read_text()) == json.loads(
        (labels / f"{key}_classes.json").read_text()
    )


def test_the_papers_annotations_in_official_form_give_the_papers_manifest(tmp_path, labels):
    """All 8,189 and 16,185 rows, in the paper's order, from mat files that are made from them."""
    import numpy as np

    for key in ("flowers", "cars"):
        names = class_names(BENCHMARKS[key])
        with gzip.open(labels / f"{key}.jsonl.gz", "rt") as stream:
            paper_rows = [json.loads(line) for line in stream]
        class_number = {name: number for number, name in enumerate(names, start=1)}
        if key == "flowers":
            (tmp_path / "jpg").mkdir()
            image_numbers = {"train": [], "test": []}
            for number, row in enumerate(paper_rows, start=1):
                image_numbers[row["split"]].append(number)
            train, test = np.array(image_numbers["train"]), np.array(image_numbers["test"])
            flower_labels = [class_number[row["label"]] for row in paper_rows]
            (tmp_path / "imagelabels.mat").write_bytes(official.mat(labels=flower_labels))
            (tmp_path / "setid.mat").write_bytes(official.mat(trnid=train[:1020], valid=train[1020:], tstid=test))
        else:
            for folder in ("cars_train", "cars_test", "devkit"):
                (tmp_path / folder).mkdir()
            meta = np.array([official.official_car(name) for name in names], dtype=object)
            (tmp_path / "devkit" / "cars_meta.mat").write_bytes(official.mat(class_names=meta))
            for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
                entries = []
                for row in paper_rows:
                    if row["split"] == split:
                        entries.append((row["image"].split("/")[-1], class_number[row["label"]]))
                (tmp_path / file).write_bytes(official.mat(annotations=official.annotations(entries)))
        prefix = f"./data/{BENCHMARKS[key].title}/"
        assert [row | {"image": prefix + row["image"]} for row in prepare(key, tmp_path)] == paper_rows


def test_the_papers_images_are_found_below_a_folder(tmp_path, realdata, labels):
    """The paper's Caltech rows with 300 of its images; the rows whose image exists can be evaluated."""
    folder = realdata / "images" / "Caltech101"
    prepare("caltech", tmp_path, archives=folder, paper_manifests=labels, data_root=None)
    rows = [row for row in read_manifest(tmp_path / "out" / "caltech.jsonl") if (folder / row["image"]).is_file()]
    assert len(rows) == 300
    (tmp_path / "caltech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "101_ObjectCategories").symlink_to(folder / "101_ObjectCategories")
    assert len(load_evaluation("caltech", root=tmp_path).examples) == 120


def test_the_default_data_root(tmp_path, monkeypatch):
    """The folder in paths.toml or the project if it contains the images, links resolved, else the images' folder."""
    official.make_flowers(tmp_path / "disk" / "flowers")
    module = script(SCRIPT)
    monkeypatch.setattr(module, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    (tmp_path / "paths.toml").write_text("[benchmarks]\n")
    (tmp_path / "project" / "data").mkdir(parents=True)

    def first_image(**options):
        options = {"archives": None, "data_root": None, "overwrite": True, "out": tmp_path / "out"} | options
        return prepare("flowers", tmp_path, **options)[0]["image"]

    outside = tmp_path / "project" / ".." / "disk" / "flowers"  # only its text starts with the project's folder
    assert first_image(archives=outside) == "jpg/image_00001.jpg"
    assert first_image(archives=outside, data_root=tmp_path / "disk") == "flowers/jpg/image_00001.jpg"
    (tmp_path / "project" / "data" / "Flowers102").symlink_to(tmp_path / "disk" / "flowers")
    assert first_image() == "jpg/image_00001.jpg"  # a link to another disk: images outside the data root are not opened
    (tmp_path / "project" / "data" / "Flowers102").unlink()
    (tmp_path / "disk" / "flowers").rename(tmp_path / "project" / "data" / "Flowers102")
    assert first_image() == "data/Flowers102/jpg/image_00001.jpg"  # as in the paper's manifest
    (tmp_path / "paths.toml").write_text('[benchmarks]\nflowers = "project/../project/data"\n')
    assert first_image() == "Flowers102/jpg/image_00001.jpg"
    monkeypatch.chdir(tmp_path / "project")
    assert first_image(archives=Path("data/Flowers102")) == "Flowers102/jpg/image_00001.jpg"


def test_the_script_prints_what_it_did(tmp_path):
    official.make_cars(tmp_path)
    command = [SCRIPT, "cars", "--archives", tmp_path, "--out", tmp_path]
    wrong = run_script(*command, check=False)
    assert wrong.returncode == 1 and "has the MD5 checksum" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "cars.jsonl").exists()
    done = run_script(*command, "--any-checksum")
    assert "StanfordCars: 392 rows (test 196, train 196) of 196 class names" in done.stdout
    assert "Mismatch: train has 196 rows, the paper's 8,144; test has 196 rows, the paper's 8,041." in done.stdout
    assert 'Every table tags runs on these rows with "not the paper\'s split"' in done.stdout
    assert f"--benchmark cars --data-root {tmp_path}" in done.stdout
    evaluation = load_evaluation("cars", root=tmp_path)  # as the printed command does
    assert len(evaluation.examples) == 196 and evaluation.tags == ("196 of 8,041 images", "not the paper's split")
    (tmp_path / "cars.jsonl").write_text("edited\n")
    refused = run_script(*command, "--any-checksum", check=False)
    assert refused.returncode == 1 and "exists with different content: add --overwrite" in refused.stderr
    assert (tmp_path / "cars.jsonl").read_text() == "edited\n"
    (tmp_path / "cars_classes.json").unlink()
    run_script(*command, "--any-checksum", check=False)
    assert not (tmp_path / "cars_classes.json").exists()  # both files are written or none


def test_archives_on_a_read_only_disk_are_unpacked_elsewhere(tmp_path, monkeypatch):
    """The file system's error is simulated: root can write to a folder without write permission."""
    shared, local = tmp_path / "shared", tmp_path / "local"
    expected = official.make_flowers(shared / "flowers-102")
    official.make_caltech(shared)
    mkdir = Path.mkdir

    def read_only_mkdir(path, *args, **kwargs):
        if path.is_relative_to(shared):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", read_only_mkdir)
    options = {"archives": shared, "out": local}
    with pytest.raises(UserError, match="flowers-102 cannot be written to or locked .*add --unpack-into DIR"):
        prepare("flowers", tmp_path, **options)
    assert without_note(prepare("flowers", tmp_path, **options, unpack_into=local, data_root=local)) == expected
    assert (local / "jpg" / "image_00001.jpg").is_file() and not (shared / "flowers-102" / "jpg").exists()
    assert len(prepare("caltech", tmp_path, **options, unpack_into=local, data_root=local)) == 202
    with pytest.raises(UserError, match="--unpack-into applies only to the official archives"):
        prepare("flowers", tmp_path, archives=None, folder=shared, unpack_into=local)
    with pytest.raises(UserError, match="102flowers.tgz is a file: give the folder that contains it"):
        prepare("flowers", tmp_path, archives=shared / "flowers-102" / "102flowers.tgz")


def test_unpacked_files_are_used_with_unpack_into(tmp_path, labels):
    """A shared disk has the cars' images unpacked, their annotations packed, and the archive inside Caltech's."""
    shared, local = tmp_path / "shared", tmp_path / "local"
    official.make_cars(shared)
    expected = prepare("cars", tmp_path, archives=shared)
    shutil.rmtree(shared / "devkit")
    for name in ("cars_train.tgz", "cars_test.tgz"):
        (shared / name).unlink()
    options = {"archives": shared, "unpack_into": local, "overwrite": True}
    assert prepare("cars", tmp_path, **options) == expected
    assert (local / "devkit").is_dir() and not (shared / "devkit").exists()
    rows = prepare("cars", tmp_path, **options, paper_manifests=labels)
    assert sum((tmp_path / row["image"]).is_file() for row in rows) == 392
    official.make_caltech(shared)
    prepare("caltech", tmp_path, archives=shared)
    shutil.rmtree(shared / "101_ObjectCategories")
    (shared / "caltech-101.zip").unlink()
    rows = prepare("caltech", tmp_path, **options)
    assert rows[0]["image"].startswith("local/101_ObjectCategories/") and len(rows) == 202


def test_caltechs_archives_partly_unpacked_by_hand(tmp_path):
    expected = [row["image"] for row in official.make_caltech(tmp_path)]
    (tmp_path / "__MACOSX").mkdir()  # the zip file has one too
    assert [row["image"] for row in prepare("caltech", tmp_path)] == expected
    (tmp_path / "caltech-101.zip").unlink()
    (tmp_path / "101_ObjectCategories").rename(tmp_path / "caltech-101" / "101_ObjectCategories")
    rows = prepare("caltech", tmp_path, overwrite=True)  # the tar file was unpacked in its own folder
    assert [row["image"] for row in rows] == [f"caltech-101/{image}" for image in expected]
    shutil.rmtree(tmp_path / "caltech-101" / "101_ObjectCategories")
    (tmp_path / "caltech-101" / "101_ObjectCategories.tar.gz").unlink()
    with pytest.raises(UserError, match="101_ObjectCategories.tar.gz does not exist .*: remove .*caltech-101 and run"):
        prepare("caltech", tmp_path)


def test_the_papers_rows_find_the_existing_images_of_torchvisions_layout(tmp_path, labels):
    """Only the test images exist; an evaluation needs no others."""
    official.make_cars(tmp_path / "stanford_cars")
    prepare("cars", tmp_path)
    shutil.rmtree(tmp_path / "stanford_cars" / "cars_train")
    (tmp_path / "stanford_cars" / "cars_train.tgz").unlink()
    rows = prepare("cars", tmp_path, paper_manifests=labels, overwrite=True)
    assert sum((tmp_path / row["image"]).is_file() for row in rows) == 196


def test_another_manifest_that_the_scripts_would_read_is_reported(tmp_path, capsys):
    official.make_caltech(tmp_path)
    prepare("caltech", tmp_path, out=tmp_path)
    assert "another manifest" not in capsys.readouterr().out
    prepare("caltech", tmp_path, seed=3)
    assert f"the scripts will read {tmp_path / 'caltech.jsonl'}, which is another manifest" in capsys.readouterr().out


def test_nested_copies_of_the_cars_are_found(tmp_path, labels):
    official.make_cars(tmp_path)
    prepare("cars", tmp_path)
    for name in ("cars_train", "cars_test"):
        (tmp_path / name).rename(tmp_path / "moved")
        (tmp_path / name).mkdir()
        (tmp_path / "moved").rename(tmp_path / name / name)
    for options in ({}, {"paper_manifests": labels}):
        rows = prepare("cars", tmp_path, overwrite=True, **options)
        existing = [row for row in rows if (tmp_path / row["image"]).is_file()]
        assert rows[0]["image"] == "cars_test/cars_test/00001.jpg" and len(existing) == 392


def damage(folder: Path, defect: str) -> None:
    """Give the official files of Flowers102 one defect."""
    file = folder / "102flowers.tgz"
    if defect == "truncated":
        file.write_bytes(file.read_bytes()[:-900])
    elif defect == "no archive":
        file.write_bytes(b"<html>not found</html>")
    elif defect == "outside":
        official.pack(file, {"jpg/image_00001.jpg": b"x", "../../outside.jpg": b"x"})
    elif defect in ("link", "hard link"):
        file.write_bytes(official.tar_with_link(tarfile.SYMTYPE if defect == "link" else tarfile.LNKTYPE))
    elif defect == "another archive":
        official.pack(file, {"png/image_00001.jpg": b"x"})
    elif defect == "another mat":
        (folder / "imagelabels.mat").write_bytes(official.mat(annotations=[1, 2]))
    elif defect == "other labels":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 196 + 1 for number in range(306)]))
    elif defect == "damaged mat":
        data = official.mat(labels=[number % 102 + 1 for number in range(306)])
        (folder / "imagelabels.mat").write_bytes(data[: len(data) // 2])
    elif defect == "no mat":
        (folder / "imagelabels.mat").write_bytes(b"nothing")
    elif defect == "fewer classes":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 101 + 1 for number in range(306)]))
    elif defect == "fewer images":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 102 + 1 for number in range(204)]))


ERRORS = {
    "truncated": "102flowers.tgz cannot be unpacked",
    "no archive": "102flowers.tgz cannot be unpacked",
    "outside": "102flowers.tgz is refused",
    "link": "102flowers.tgz is refused .*is a link",
    "hard link": "102flowers.tgz is refused .*is a link",
    "another archive": "102flowers.tgz does not contain jpg",
    "another mat": "imagelabels.mat has no variable 'labels'",
    "damaged mat": "imagelabels.mat has no variable 'labels'",
    "no mat": "imagelabels.mat has no variable 'labels'",
    "other labels": "imagelabels.mat has 103 in its variable 'labels', which is not a number from 1 to 102",
    "fewer classes": "imagelabels.mat has 101 of the 102 classes",
    "fewer images": "setid.mat has 205 in its variable 'tstid', which is not a number from 1 to 204",
}


@pytest.mark.parametrize("defect", ERRORS)
def test_bad_archives_raise_an_error_and_leave_no_files(tmp_path, defect):
    folder = tmp_path / "inner" / "archives"
    official.make_flowers(folder)
    damage(folder, defect)
    with pytest.raises(UserError, match=ERRORS[defect]):
        prepare("flowers", folder)
    assert not (folder / "out").exists() and not list(tmp_path.rglob("outside.jpg"))
    assert not list(folder.glob(".*")) and (folder / "jpg").is_dir() == ("mat" in ERRORS[defect])
    (folder / "102flowers.tgz").unlink(missing_ok=True)
    shutil.rmtree(folder / "jpg", ignore_errors=True)
    shutil.rmtree(folder / "png", ignore_errors=True)
    official.make_flowers(folder)
    assert len(prepare("flowers", folder)) == 306  # replacing the bad files is enough


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_mat_file_raises_a_user_error(tmp_path, compressed):
    """The file is truncated, or one byte is changed, at many positions: SciPy raises half a dozen types of errors.

    No byte of an uncompressed file is changed: that can crash SciPy's reader and end the process.
    """
    stream = io.BytesIO()
    savemat(stream, {"annotations": official.annotations([("a.jpg", 1)] * 30)}, do_compression=compressed)
    content, file = stream.getvalue(), tmp_path / "a.mat"
    for position in range(130, len(content), len(content) // 60):
        damaged = [content[:position]]
        if compressed:
            changed = bytearray(content)
            changed[position] ^= 0x55
            damaged.append(bytes(changed))
        for data in damaged:
            file.write_bytes(data)
            with pytest.raises(UserError, match="a.mat "):
                layouts._read_annotations(file, 1)


def test_cars_test_annotations_without_labels_are_refused(tmp_path):
    official.make_cars(tmp_path)
    import numpy as np

    dtype = [("bbox_x1", "O"), ("fname", "O")]
    unlabelled = np.array([(1, "00001.jpg"), (1, "00002.jpg")], dtype=dtype)
    (tmp_path / "cars_test_annos_withlabels.mat").write_bytes(official.mat(annotations=unlabelled))
    with pytest.raises(UserError, match="cars_test_annos_withlabels.mat has no file names with classes"):
        prepare("cars", tmp_path)
    outside = official.annotations([("../../00001.jpg", 1)])
    (tmp_path / "cars_test_annos_withlabels.mat").write_bytes(official.mat(annotations=outside))
    with pytest.raises(UserError, match="cars_test/../../00001.jpg leaves the data root"):
        prepare("cars", tmp_path)
    (tmp_path / "devkit" / "cars_meta.mat").write_bytes(official.mat(class_names=[1, 2]))
    with pytest.raises(UserError, match="cars_meta.mat has the number 1 as a class name"):
        prepare("cars", tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [("cars", "car_|cars_.* address of StanfordCars is dead"), ("imagenet", "registration at image-net.org"),
     ("flowers", "run without --no-download")],
)  # fmt: skip
def test_a_missing_file_that_is_not_downloaded_raises_an_error_with_a_remedy(tmp_path, key, message):
    with pytest.raises(UserError, match=message):
        prepare(key, tmp_path, download=key != "flowers")


def test_the_official_checksums_are_torchvisions():
    from torchvision.datasets import Flowers102
    from torchvision.datasets.imagenet import ARCHIVE_META

    assert [(r.name, r.md5) for r in layouts.FLOWERS] == [Flowers102._file_dict[k] for k in ("image", "label", "setid")]
    assert all(r.url == Flowers102._download_url_prefix + r.name for r in layouts.FLOWERS)
    assert [(r.name, r.md5) for r in layouts.IMAGENET] == [ARCHIVE_META["val"], ARCHIVE_META["devkit"]]


def test_every_class_is_found_by_the_names_of_copies():
    flowers = ClassFinder(BENCHMARKS["flowers"], class_names(BENCHMARKS["flowers"]))
    names = [flowers.names[flowers.find(name, "x")] for name in ("globe-flower", "ball moss", "pink-yellow dahlia?")]
    assert names == ["globe flower", "air plant", "pink and yellow dahlia"]
    cars = ClassFinder(BENCHMARKS["cars"], class_names(BENCHMARKS["cars"]))
    assert [cars.find(official.official_car(name), "x") for name in cars.names] == list(range(196))
    assert cars.names[cars.find("Ram C-V Cargo Van Minivan 2012", "x")] == "2012 Ram C/V Cargo Van Minivan"
    with pytest.raises(UserError, match="the number 17"):
        flowers.find("17", "x")
    with pytest.raises(UserError, match="'toaster', which is not a class of Flowers102"):
        flowers.find("toaster", "x")
