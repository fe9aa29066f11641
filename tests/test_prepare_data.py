"""Protects: manifests from the official archives: the right rows, unpacked safely, nothing believed unchecked."""

import errno
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import official
import pytest
from conftest import run_script, script
from official import prepare, read
from scipy.io import savemat

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.preparing import manifests
from vlmclassifier.preparing import official as layouts
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError

SCRIPT = "scripts/prepare_data.py"


def bare(rows):
    return [{key: value for key, value in row.items() if key != "note"} for row in rows]


@pytest.mark.parametrize("key", official.MAKERS)
def test_official_archives_give_the_hand_written_manifest(tmp_path, key):
    expected = official.MAKERS[key](tmp_path)
    rows = prepare(key, tmp_path)
    assert bare(rows) == expected
    assert {row["note"] for row in rows} == {"not the paper's split"}  # these few rows are not
    assert json.loads((tmp_path / "out" / f"{key}_classes.json").read_text()) == list(class_names(BENCHMARKS[key]))
    first = (tmp_path / "out" / f"{key}.jsonl").read_bytes()
    for packed in [*tmp_path.glob("*.t*gz"), *tmp_path.glob("*.tar")]:
        packed.unlink()  # what is unpacked is enough
    prepare(key, tmp_path)
    assert (tmp_path / "out" / f"{key}.jsonl").read_bytes() == first


def test_caltech_without_the_papers_rows_is_halved_by_seed(tmp_path):
    expected = official.make_caltech(tmp_path)
    rows = prepare("caltech", tmp_path)
    assert [{"image": r["image"], "label": r["label"]} for r in rows] == expected
    halves = {label: Counter(r["split"] for r in rows if r["label"] == label) for label in ("face", "leopard")}
    assert halves == {"face": {"train": 2, "test": 2}, "leopard": {"train": 1, "test": 1}}
    assert {row["note"] for row in rows} == {"not the paper's split"}
    same = prepare("caltech", tmp_path, overwrite=True)
    other = prepare("caltech", tmp_path, overwrite=True, seed=1)
    assert same == rows and Counter(r["split"] for r in other) == Counter(r["split"] for r in rows) and other != rows
    first = sorted((tmp_path / "101_ObjectCategories").glob("*/image_0002.jpg"))[1:30]
    for path in first:
        path.unlink()  # fewer pictures elsewhere: the others stay in their half
    fewer = {row["image"]: row["split"] for row in prepare("caltech", tmp_path, overwrite=True)}
    gone = {path.parent.name for path in first}
    there = [r for r in rows if r["image"].split("/")[1] not in gone]
    assert len(there) > 100 and all(fewer[r["image"]] == r["split"] for r in there)
    alone = [split for image, split in fewer.items() if image.split("/")[1] in gone - {"Faces", "Faces_easy"}]
    assert len(alone) > 20 and set(alone) == {"train"}  # of an odd number the train split has one more


def test_only_the_papers_rows_go_without_the_note(tmp_path, monkeypatch, capsys):
    """Right counts are not enough for files that say of each picture which it is."""
    counts = {"flowers": {"train": 204, "test": 102}, "caltech": {"train": 101, "test": 101}}
    monkeypatch.setattr(manifests, "PAPER_COUNTS", counts)
    for key, make in (("flowers", official.make_flowers), ("caltech", official.make_caltech)):
        rows = make(tmp_path / key)
        assert {row["note"] for row in prepare(key, tmp_path / key)} == {"not the paper's split"}
        said = capsys.readouterr().out
        assert ("some pictures have another label or split" if key == "flowers" else "split is another one") in said
        rows = rows if key == "flowers" else prepare(key, tmp_path / key)
        lines = sorted("{}\t{label}\t{split}\n".format("/".join(r["image"].split("/")[-2:]), **r) for r in rows)
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        monkeypatch.setitem(manifests.PAPER_DIGESTS, key, digest)
        assert not any("note" in row for row in prepare(key, tmp_path / key, overwrite=True))
        assert "the same pictures with the same labels" in capsys.readouterr().out


def test_halves_of_the_cars_have_the_papers_counts_and_are_not_its_split(tmp_path, labels, capsys):
    """Half of each class, rounded up, is 8,144 pictures in all: the counts alone would say "as in the paper"."""
    with gzip.open(labels / "cars.jsonl.gz", "rt") as stream:
        counted = Counter(json.loads(line)["label"] for line in stream)
    for name, count in counted.items():
        folder = tmp_path / "cars" / official.official_car(name).replace("/", "-")
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:05}.jpg").touch()
    rows = prepare("cars", tmp_path, archives=None, folder=tmp_path / "cars")
    assert Counter(row["split"] for row in rows) == {"train": 8_144, "test": 8_041}
    assert {row["note"] for row in rows} == {"not the paper's split"}
    assert "the splits above are ours (--seed 0)" in capsys.readouterr().out


def test_manifests_that_are_not_the_papers_are_not_taken_for_them(tmp_path, labels, capsys):
    with gzip.open(labels / "caltech.jsonl.gz", "rt") as stream:
        papers = [json.loads(line) for line in stream]
    given = tmp_path / "given"
    given.mkdir()

    def take(rows):
        (given / "caltech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return prepare("caltech", tmp_path, paper_manifests=given, overwrite=True)

    assert not any("note" in row for row in take(papers[::-1]))  # in whatever order
    changed = [papers[0] | {"label": papers[-1]["label"]}, *papers[1:-1], papers[-1] | {"label": papers[0]["label"]}]
    assert papers[0]["label"] != papers[-1]["label"] and all("note" in row for row in take(changed))
    with pytest.raises(UserError, match='row 1 says "not the paper\'s split"'):
        take([row | {"note": "not the paper's split"} for row in papers])
    for wrong in (4, "3", 5000, 3.0):
        with pytest.raises(UserError, match=f"row 2: the label 'accordion' is class 3, but label_idx is {wrong}"):
            take([papers[0], papers[1] | {"label": "accordion", "label_idx": wrong}])
    with pytest.raises(UserError, match="row 1: the label 'toaster' is not in the class list"):
        take([papers[0] | {"label": "toaster"}])
    with pytest.raises(UserError, match="has no rows"):
        take([])
    with pytest.raises(UserError, match="the image path ./data/Caltech101 names no picture"):
        take([papers[0] | {"image": "./data/Caltech101"}])


@pytest.mark.parametrize(
    ("key", "inner"), [("flowers", "flowers-102"), ("cars", "stanford_cars"), ("caltech", "caltech101")]
)
def test_torchvisions_layout_is_used_as_it_is(tmp_path, key, inner):
    """What torchvision's own classes read, with the archives gone."""
    folder = tmp_path / inner
    folder.mkdir()
    rows = official.make_caltech(folder) if key == "caltech" else official.MAKERS[key](folder)
    flat = prepare(key, folder)
    for packed in [*folder.glob("*.t*gz"), *folder.glob("*.zip")]:
        packed.unlink()
    inside = prepare(key, tmp_path)  # from the folder above, as torchvision's `root`
    assert [row | {"image": f"{inner}/{row['image']}"} for row in flat] == inside and len(inside) == len(rows)


def test_torchvision_reads_the_same_flowers(tmp_path):
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    official.make_flowers(folder)
    rows = prepare("flowers", tmp_path)
    whole = Flowers102._check_integrity
    Flowers102._check_integrity = lambda self: True  # our small mat files have checksums of their own
    try:
        theirs = Flowers102(str(tmp_path), split="test")
    finally:
        Flowers102._check_integrity = whole
    names = class_names(BENCHMARKS["flowers"])
    ours = [(row["image"], row["label"]) for row in rows if row["split"] == "test"]
    pairs = zip(theirs._image_files, theirs._labels, strict=True)
    assert ours == [(str(file.relative_to(tmp_path)), names[label]) for file, label in pairs]


COUNTS = {
    "flowers": (8_189, {"train": 2_040, "test": 6_149}),
    "cars": (16_185, {"train": 8_144, "test": 8_041}),
    "caltech": (8_677, {"train": 4_346, "test": 4_331}),
}


@pytest.mark.parametrize("key", COUNTS)
def test_the_papers_rows_are_used_where_they_are_given(tmp_path, labels, key, capsys):
    rows = prepare(key, tmp_path, paper_manifests=labels)
    count, splits = COUNTS[key]
    assert len(rows) == count and Counter(row["split"] for row in rows) == splits
    said = capsys.readouterr().out
    assert (
        "As in the paper: the same pictures" in said
        and f"{count:,} of the {count:,} pictures are not there yet" in said
    )
    assert not any("note" in row for row in rows)
    with gzip.open(labels / f"{key}.jsonl.gz", "rt") as stream:
        papers = [json.loads(line) for line in stream]
    prefix = f"./data/{BENCHMARKS[key].title}/"
    assert [row | {"image": prefix + row["image"]} for row in rows] == papers
    assert json.loads((tmp_path / "out" / f"{key}_classes.json").read_text()) == json.loads(
        (labels / f"{key}_classes.json").read_text()
    )


def test_the_papers_annotations_in_official_form_give_the_papers_manifest(tmp_path, labels):
    """All 8,189 and 16,185 rows, in the paper's order, from mat files that we make of them."""
    import numpy as np

    for key in ("flowers", "cars"):
        names = class_names(BENCHMARKS[key])
        with gzip.open(labels / f"{key}.jsonl.gz", "rt") as stream:
            papers = [json.loads(line) for line in stream]
        index = {name: number for number, name in enumerate(names, start=1)}
        if key == "flowers":
            (tmp_path / "jpg").mkdir()
            ids = [np.array([n for n, r in enumerate(papers, 1) if r["split"] == s]) for s in ("train", "test")]
            sets = {"trnid": ids[0][:1020], "valid": ids[0][1020:], "tstid": ids[1]}
            (tmp_path / "imagelabels.mat").write_bytes(official.mat(labels=[index[r["label"]] for r in papers]))
            (tmp_path / "setid.mat").write_bytes(official.mat(**sets))
        else:
            for folder in ("cars_train", "cars_test", "devkit"):
                (tmp_path / folder).mkdir()
            meta = np.array([official.official_car(name) for name in names], dtype=object)
            (tmp_path / "devkit" / "cars_meta.mat").write_bytes(official.mat(class_names=meta))
            for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
                some = [(r["image"].split("/")[-1], index[r["label"]]) for r in papers if r["split"] == split]
                (tmp_path / file).write_bytes(official.mat(annotations=official.annotations(some)))
        prefix = f"./data/{BENCHMARKS[key].title}/"
        assert [row | {"image": prefix + row["image"]} for row in prepare(key, tmp_path)] == papers


def test_the_papers_photographs_are_found_below_a_folder(tmp_path, realdata, labels):
    """The paper's Caltech rows beside 300 of its photographs; what is there can be evaluated."""
    folder = realdata / "images" / "Caltech101"
    prepare("caltech", tmp_path, archives=folder, paper_manifests=labels, data_root=None)
    rows = [row for row in read(tmp_path / "out" / "caltech.jsonl") if (folder / row["image"]).is_file()]
    assert len(rows) == 300
    (tmp_path / "caltech.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "101_ObjectCategories").symlink_to(folder / "101_ObjectCategories")
    assert len(load_evaluation("caltech", root=tmp_path).examples) == 120


def test_where_the_image_paths_start(tmp_path, monkeypatch):
    """Below paths.toml's root or the project where the pictures truly lie there, else at their own folder."""
    official.make_flowers(tmp_path / "disk" / "flowers")
    module = script(SCRIPT)
    monkeypatch.setattr(module, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    (tmp_path / "paths.toml").write_text("[benchmarks]\n")
    (tmp_path / "project" / "data").mkdir(parents=True)

    def first(**options):
        options = {"archives": None, "data_root": None, "overwrite": True, "out": tmp_path / "out"} | options
        return prepare("flowers", tmp_path, **options)[0]["image"]

    dotted = tmp_path / "project" / ".." / "disk" / "flowers"
    assert first(archives=dotted) == "jpg/image_00001.jpg"  # not below the project, whatever the words say
    assert first(archives=dotted, data_root=tmp_path / "disk") == "flowers/jpg/image_00001.jpg"
    (tmp_path / "project" / "data" / "Flowers102").symlink_to(tmp_path / "disk" / "flowers")
    assert first() == "jpg/image_00001.jpg"  # a link to another disk: pictures outside of a root are never opened
    (tmp_path / "project" / "data" / "Flowers102").unlink()
    (tmp_path / "disk" / "flowers").rename(tmp_path / "project" / "data" / "Flowers102")
    assert first() == "data/Flowers102/jpg/image_00001.jpg"  # as in the paper's manifest
    (tmp_path / "paths.toml").write_text('[benchmarks]\nflowers = "project/../project/data"\n')
    assert first() == "Flowers102/jpg/image_00001.jpg"
    monkeypatch.chdir(tmp_path / "project")
    assert first(archives=Path("data/Flowers102")) == "Flowers102/jpg/image_00001.jpg"


def test_the_script_says_what_it_did(tmp_path):
    official.make_cars(tmp_path)
    words = [SCRIPT, "cars", "--archives", tmp_path, "--out", tmp_path]
    wrong = run_script(*words, check=False)
    assert wrong.returncode == 1 and "has the MD5 checksum" in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "cars.jsonl").exists()
    done = run_script(*words, "--any-checksum")
    assert "StanfordCars: 392 rows (test 196, train 196) of 196 class names" in done.stdout
    assert "Mismatch: train has 196 rows, the paper's 8,144; test has 196 rows, the paper's 8,041." in done.stdout
    assert 'Every table will say "not the paper\'s split"' in done.stdout
    assert f"--benchmark cars --data-root {tmp_path}" in done.stdout
    task = load_evaluation("cars", root=tmp_path)  # as the printed command would
    assert len(task.examples) == 196 and task.marks == {"note": "not the paper's split"}
    (tmp_path / "cars.jsonl").write_text("mine\n")
    kept = run_script(*words, "--any-checksum", check=False)
    assert kept.returncode == 1 and "is there with other content: add --overwrite" in kept.stderr
    assert (tmp_path / "cars.jsonl").read_text() == "mine\n"
    (tmp_path / "cars_classes.json").unlink()
    run_script(*words, "--any-checksum", check=False)
    assert not (tmp_path / "cars_classes.json").exists()  # both or none


def test_archives_that_cannot_be_written_to_are_unpacked_elsewhere(tmp_path, monkeypatch):
    """A data set on a shared disk; read-only is what the file system says, whoever asks."""
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    expected = official.make_flowers(shared / "flowers-102")
    official.make_caltech(shared)
    mkdir = Path.mkdir

    def refused(path, *words, **more):
        if path.is_relative_to(shared):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *words, **more)

    monkeypatch.setattr(Path, "mkdir", refused)
    options = {"archives": shared, "out": mine}
    with pytest.raises(UserError, match="Nothing can be written to .*flowers-102, .*add --unpack-into DIR"):
        prepare("flowers", tmp_path, **options)
    assert bare(prepare("flowers", tmp_path, **options, unpack_into=mine, data_root=mine)) == expected
    assert (mine / "jpg" / "image_00001.jpg").is_file() and not (shared / "flowers-102" / "jpg").exists()
    assert len(prepare("caltech", tmp_path, **options, unpack_into=mine, data_root=mine)) == 202
    with pytest.raises(UserError, match="--unpack-into goes with the official archives"):
        prepare("flowers", tmp_path, archives=None, folder=shared, unpack_into=mine)
    with pytest.raises(UserError, match="102flowers.tgz is a file: name the folder that holds it"):
        prepare("flowers", tmp_path, archives=shared / "flowers-102" / "102flowers.tgz")


def test_what_is_unpacked_already_is_used_beside_unpack_into(tmp_path, labels):
    """A shared disk with the cars' pictures unpacked and their annotations packed; Caltech's inner archive there."""
    shared, mine = tmp_path / "shared", tmp_path / "mine"
    official.make_cars(shared)
    expected = prepare("cars", tmp_path, archives=shared)
    shutil.rmtree(shared / "devkit")
    for name in ("cars_train.tgz", "cars_test.tgz"):
        (shared / name).unlink()
    options = {"archives": shared, "unpack_into": mine, "overwrite": True}
    assert prepare("cars", tmp_path, **options) == expected
    assert (mine / "devkit").is_dir() and not (shared / "devkit").exists()
    rows = prepare("cars", tmp_path, **options, paper_manifests=labels)
    assert sum((tmp_path / row["image"]).is_file() for row in rows) == 392
    official.make_caltech(shared)
    prepare("caltech", tmp_path, archives=shared)
    shutil.rmtree(shared / "101_ObjectCategories")
    (shared / "caltech-101.zip").unlink()
    rows = prepare("caltech", tmp_path, **options)
    assert rows[0]["image"].startswith("mine/101_ObjectCategories/") and len(rows) == 202


def test_caltechs_archives_half_unpacked_by_hand(tmp_path):
    expected = [row["image"] for row in official.make_caltech(tmp_path)]
    (tmp_path / "__MACOSX").mkdir()  # another program's leftover, also in the zip file
    assert [row["image"] for row in prepare("caltech", tmp_path)] == expected
    (tmp_path / "caltech-101.zip").unlink()
    (tmp_path / "101_ObjectCategories").rename(tmp_path / "caltech-101" / "101_ObjectCategories")
    rows = prepare("caltech", tmp_path, overwrite=True)  # the tar file was unpacked beside itself
    assert [row["image"] for row in rows] == [f"caltech-101/{image}" for image in expected]
    shutil.rmtree(tmp_path / "caltech-101" / "101_ObjectCategories")
    (tmp_path / "caltech-101" / "101_ObjectCategories.tar.gz").unlink()
    with pytest.raises(UserError, match="101_ObjectCategories.tar.gz is absent .*: remove .*caltech-101 and run again"):
        prepare("caltech", tmp_path)


def test_the_papers_rows_find_what_is_there_of_torchvisions_layout(tmp_path, labels):
    """Only the test pictures, which is all that an evaluation needs."""
    official.make_cars(tmp_path / "stanford_cars")
    prepare("cars", tmp_path)
    shutil.rmtree(tmp_path / "stanford_cars" / "cars_train")
    (tmp_path / "stanford_cars" / "cars_train.tgz").unlink()
    rows = prepare("cars", tmp_path, paper_manifests=labels, overwrite=True)
    assert sum((tmp_path / row["image"]).is_file() for row in rows) == 196


def test_another_manifest_that_would_be_read_is_named(tmp_path, capsys):
    official.make_caltech(tmp_path)
    prepare("caltech", tmp_path, out=tmp_path)
    assert "another manifest" not in capsys.readouterr().out
    prepare("caltech", tmp_path, seed=3)
    assert f"the scripts will read {tmp_path / 'caltech.jsonl'}, which is another manifest" in capsys.readouterr().out


def test_nested_copies_of_the_cars_are_found(tmp_path, labels):
    official.make_cars(tmp_path)
    prepare("cars", tmp_path)
    for name in ("cars_train", "cars_test"):
        (tmp_path / name).rename(tmp_path / "x")
        (tmp_path / name).mkdir()
        (tmp_path / "x").rename(tmp_path / name / name)
    for more in ({}, {"paper_manifests": labels}):
        rows = prepare("cars", tmp_path, overwrite=True, **more)
        there = [row for row in rows if (tmp_path / row["image"]).is_file()]
        assert rows[0]["image"] == "cars_test/cars_test/00001.jpg" and len(there) == 392


def damage(folder, how: str) -> None:
    """One thing wrong with the official files of Flowers102 or of another benchmark."""
    file = folder / "102flowers.tgz"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-900])
    elif how == "no archive":
        file.write_bytes(b"<html>not found</html>")
    elif how == "outside":
        official.pack(file, {"jpg/image_00001.jpg": b"x", "../../outside.jpg": b"x"})
    elif how in ("link", "hard link"):
        file.write_bytes(official.link(tarfile.SYMTYPE if how == "link" else tarfile.LNKTYPE))
    elif how == "another archive":
        official.pack(file, {"png/image_00001.jpg": b"x"})
    elif how == "another mat":
        (folder / "imagelabels.mat").write_bytes(official.mat(annotations=[1, 2]))
    elif how == "other labels":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 196 + 1 for number in range(306)]))
    elif how == "damaged mat":
        data = official.mat(labels=[number % 102 + 1 for number in range(306)])
        (folder / "imagelabels.mat").write_bytes(data[: len(data) // 2])
    elif how == "no mat":
        (folder / "imagelabels.mat").write_bytes(b"nothing")
    elif how == "fewer classes":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 101 + 1 for number in range(306)]))
    elif how == "fewer pictures":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 102 + 1 for number in range(204)]))


BAD = {
    "truncated": "102flowers.tgz cannot be unpacked",
    "no archive": "102flowers.tgz cannot be unpacked",
    "outside": "102flowers.tgz is refused",
    "link": "102flowers.tgz is refused .*is a link",
    "hard link": "102flowers.tgz is refused .*is a link",
    "another archive": "102flowers.tgz does not hold jpg",
    "another mat": "imagelabels.mat holds no 'labels'",
    "damaged mat": "imagelabels.mat holds no 'labels'",
    "no mat": "imagelabels.mat holds no 'labels'",
    "other labels": "imagelabels.mat has 103 among its 'labels', not a number from 1 to 102",
    "fewer classes": "imagelabels.mat has 101 of the 102 classes",
    "fewer pictures": "setid.mat has 205 among its 'tstid', not a number from 1 to 204",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_archives_end_in_a_sentence_and_leave_nothing(tmp_path, how):
    folder = tmp_path / "inner" / "archives"
    official.make_flowers(folder)
    damage(folder, how)
    with pytest.raises(UserError, match=BAD[how]):
        prepare("flowers", folder)
    assert not (folder / "out").exists() and not list(tmp_path.rglob("outside.jpg"))
    assert not list(folder.glob(".*")) and (folder / "jpg").is_dir() == ("mat" in BAD[how])
    (folder / "102flowers.tgz").unlink(missing_ok=True)
    shutil.rmtree(folder / "jpg", ignore_errors=True)
    shutil.rmtree(folder / "png", ignore_errors=True)
    official.make_flowers(folder)
    assert len(prepare("flowers", folder)) == 306  # the right files in their place are enough


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_mat_file_is_a_sentence_wherever_it_is_damaged(tmp_path, compressed):
    """Cut off, or one byte changed, at many places: the reader raises half a dozen kinds of errors.

    No byte is changed where nothing is compressed: there SciPy's reader can end the process.
    """
    stream = io.BytesIO()
    savemat(stream, {"annotations": official.annotations([("a.jpg", 1)] * 30)}, do_compression=compressed)
    whole, file = stream.getvalue(), tmp_path / "a.mat"
    for place in range(130, len(whole), len(whole) // 60):
        changed = bytes([*whole[:place], whole[place] ^ 0x55, *whole[place + 1 :]])
        for data in (whole[:place], changed)[: 1 + compressed]:
            file.write_bytes(data)
            with pytest.raises(UserError, match="a.mat "):
                layouts._annotations(file, 1)


def test_cars_test_annotations_without_labels_are_named(tmp_path):
    official.make_cars(tmp_path)
    import numpy as np

    kind = [("bbox_x1", "O"), ("fname", "O")]
    plain = np.array([(1, "00001.jpg"), (1, "00002.jpg")], dtype=kind)
    (tmp_path / "cars_test_annos_withlabels.mat").write_bytes(official.mat(annotations=plain))
    with pytest.raises(UserError, match="cars_test_annos_withlabels.mat has no file names with classes"):
        prepare("cars", tmp_path)
    outside = official.annotations([("../../00001.jpg", 1)])
    (tmp_path / "cars_test_annos_withlabels.mat").write_bytes(official.mat(annotations=outside))
    with pytest.raises(UserError, match="cars_test/../../00001.jpg leaves the data root"):
        prepare("cars", tmp_path)
    (tmp_path / "devkit" / "cars_meta.mat").write_bytes(official.mat(class_names=[1, 2]))
    with pytest.raises(UserError, match="cars_meta.mat has the number 1 for a class name"):
        prepare("cars", tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [("cars", "car_|cars_.* address of StanfordCars is dead"), ("imagenet", "registration at image-net.org"),
     ("flowers", "leave --no-download out")],
)  # fmt: skip
def test_what_cannot_be_downloaded_says_where_it_is(tmp_path, key, words):
    with pytest.raises(UserError, match=words):
        prepare(key, tmp_path, download=key != "flowers")


def test_the_official_checksums_are_torchvisions():
    from torchvision.datasets import Flowers102
    from torchvision.datasets.imagenet import ARCHIVE_META

    assert [(r.name, r.md5) for r in layouts.FLOWERS] == [Flowers102._file_dict[k] for k in ("image", "label", "setid")]
    assert all(r.url == Flowers102._download_url_prefix + r.name for r in layouts.FLOWERS)
    assert [(r.name, r.md5) for r in layouts.IMAGENET] == [ARCHIVE_META["val"], ARCHIVE_META["devkit"]]


def test_every_class_is_found_by_other_peoples_names():
    flowers = ClassFinder(BENCHMARKS["flowers"], class_names(BENCHMARKS["flowers"]))
    names = [flowers.names[flowers.find(name, "x")] for name in ("globe-flower", "ball moss", "pink-yellow dahlia?")]
    assert names == ["globe flower", "air plant", "pink and yellow dahlia"]
    cars = ClassFinder(BENCHMARKS["cars"], class_names(BENCHMARKS["cars"]))
    assert [cars.find(official.official_car(name), "x") for name in cars.names] == list(range(196))
    assert cars.names[cars.find("Ram C-V Cargo Van Minivan 2012", "x")] == "2012 Ram C/V Cargo Van Minivan"
    with pytest.raises(UserError, match="the number 17"):
        flowers.find("17", "x")
    with pytest.raises(UserError, match="'toaster', which is none of Flowers102's"):
        flowers.find("toaster", "x")
