"""Protects: manifests from the official archives: the right rows, unpacked safely, nothing believed unchecked."""

import gzip
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import official
import pytest
from conftest import run_script, script

from vlmclassifier.benchmarks import BENCHMARKS, class_names, load_evaluation
from vlmclassifier.preparing import archives, manifests
from vlmclassifier.preparing import official as layouts
from vlmclassifier.preparing.archives import Remote, checksum, fetch, unpack
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError

SCRIPT = "scripts/prepare_data.py"


def prepare(benchmark, folder, **options):
    """The script's main on the archives in `folder`; the manifest's rows."""
    module = script(SCRIPT)
    given = {"archives": folder, "out": folder / "out", "data_root": folder, "download": False, "any_checksum": True}
    args = module.Args(benchmark, **(given | options))
    module.main(args)
    return read(args.out / f"{benchmark}.jsonl")


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


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


def test_only_rows_that_can_be_the_papers_go_without_the_note(tmp_path, monkeypatch):
    """Right counts are enough for an official split; Caltech's halves are never the paper's."""
    counts = {"flowers": {"train": 204, "test": 102}, "caltech": {"train": 101, "test": 101}}
    monkeypatch.setattr(manifests, "PAPER_COUNTS", counts)
    for key, make in (("flowers", official.make_flowers), ("caltech", official.make_caltech)):
        make(tmp_path / key)
        notes = {row.get("note") for row in prepare(key, tmp_path / key)}
        assert notes == {None if key == "flowers" else "not the paper's split"}


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
    assert "As in the paper." in said and f"{count:,} of the {count:,} pictures are not there yet" in said
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


def link(kind: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as opened:
        info = tarfile.TarInfo("jpg/image_00001.jpg")
        info.type, info.linkname = kind, "jpg/image_00002.jpg"
        opened.addfile(info)
    return stream.getvalue()


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
        file.write_bytes(link(tarfile.SYMTYPE if how == "link" else tarfile.LNKTYPE))
    elif how == "another archive":
        official.pack(file, {"png/image_00001.jpg": b"x"})
    elif how == "another mat":
        (folder / "imagelabels.mat").write_bytes(official.mat(annotations=[1, 2]))
    elif how == "other labels":
        (folder / "imagelabels.mat").write_bytes(official.mat(labels=[number % 196 + 1 for number in range(306)]))
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


def test_an_absolute_path_in_a_tar_stays_inside(tmp_path):
    """tarfile's data filter strips the leading slash."""
    official.pack(tmp_path / "a.tgz", {f"{tmp_path}/outside/x.jpg": b"x"})
    unpack(tmp_path / "a.tgz", tmp_path / "in")
    assert not (tmp_path / "outside").exists() and list((tmp_path / "in").rglob("x.jpg"))


@pytest.mark.parametrize("name", ["../outside.jpg", "/outside.jpg", "a/../../outside.jpg", "link"])
def test_a_bad_zip_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        info = zipfile.ZipInfo(name)
        info.external_attr = (0o120777 if name == "link" else 0o100644) << 16
        opened.writestr(info, "target")
    with pytest.raises(UserError, match="a.zip is refused"):
        unpack(tmp_path / "a.zip", tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_an_archive_that_grows_beyond_reason_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "SPARE", 1000)
    for file in (tmp_path / "a.tgz", tmp_path / "a.zip"):
        official.pack(file, {"a": b"0" * 1_000_000})
        if file.suffix == ".zip":
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
                opened.writestr("a", b"0" * 1_000_000)
        with pytest.raises(UserError, match="grows beyond"):
            unpack(file, tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_a_folder_that_is_there_but_not_whole_is_named(tmp_path):
    official.pack(tmp_path / "a.tgz", {"jpg/1.jpg": b"1"})
    (tmp_path / "jpg").mkdir()
    with pytest.raises(UserError, match="jpg is there, but not whole"):
        unpack(tmp_path / "a.tgz", tmp_path)
    assert not list((tmp_path / "jpg").iterdir())


def test_cars_test_annotations_without_labels_are_named(tmp_path):
    official.make_cars(tmp_path)
    import numpy as np

    kind = [("bbox_x1", "O"), ("fname", "O")]
    plain = np.array([(1, "00001.jpg"), (1, "00002.jpg")], dtype=kind)
    (tmp_path / "cars_test_annos_withlabels.mat").write_bytes(official.mat(annotations=plain))
    with pytest.raises(UserError, match="cars_test_annos_withlabels.mat has no file names with classes"):
        prepare("cars", tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [("cars", "car_|cars_.* address of StanfordCars is dead"), ("imagenet", "registration at image-net.org"),
     ("flowers", "leave --no-download out")],
)  # fmt: skip
def test_what_cannot_be_downloaded_says_where_it_is(tmp_path, key, words):
    with pytest.raises(UserError, match=words):
        prepare(key, tmp_path, download=key != "flowers")


class Files(BaseHTTPRequestHandler):
    """Sends `data`; breaks off after `pieces` bytes of a connection, or knows no ranges."""

    data, piece, ranges, asked = b"", 0, True, []

    def log_message(self, *words):
        """Quiet."""

    def do_GET(self):
        if self.path != "/file":
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.asked.append(start)
        if start >= len(self.data) and self.ranges:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.data)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        self.wfile.write(self.data[start : start + self.piece] if self.piece else self.data[start:])


@pytest.fixture
def server(monkeypatch):
    kind = type("Handler", (Files,), {"asked": []})
    http = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    kind.url = f"http://127.0.0.1:{http.server_address[1]}/file"
    yield kind
    http.shutdown()
    http.server_close()


def test_a_broken_download_goes_on_where_it_broke_off(tmp_path, server):
    server.data, server.piece = bytes(range(256)) * 400, 30_000
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data and server.asked == [0, 30_000, 60_000, 90_000]
    assert not (tmp_path / "f.part").exists()
    (tmp_path / "g.part").write_bytes(server.data[:50_000])  # of a process that was killed
    server.piece = 0
    fetch(server.url, tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == server.data and server.asked[4:] == [50_000]
    (tmp_path / "h.part").write_bytes(server.data)  # killed between the last byte and the new name
    fetch(server.url, tmp_path / "h")
    assert (tmp_path / "h").read_bytes() == server.data
    (tmp_path / "i.part").write_bytes(server.data + b"more")  # of another file
    fetch(server.url, tmp_path / "i")
    assert (tmp_path / "i").read_bytes() == server.data


def test_a_server_without_ranges_sends_it_again(tmp_path, server):
    server.data, server.ranges = b"0123456789" * 1000, False
    (tmp_path / "f.part").write_bytes(b"xxxx")
    fetch(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == server.data


def test_a_download_that_does_not_work_ends_in_a_sentence(tmp_path, server):
    with pytest.raises(UserError, match="404.*data/README.md"):
        fetch(server.url + "s", tmp_path / "f")
    server.data, server.piece, server.ranges = b"0" * 1000, 10, False
    with pytest.raises(UserError, match="nothing new in 5 attempts .10 of 1000 bytes.*the same command goes on"):
        fetch(server.url, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    with pytest.raises(UserError, match="nothing new in 5 attempts .ConnectionError"):
        fetch("http://127.0.0.1:9/file", tmp_path / "g")  # nobody listens there


def test_what_was_downloaded_is_checked(tmp_path, server, monkeypatch):
    official.make_flowers(tmp_path)
    server.data = (tmp_path / "102flowers.tgz").read_bytes()
    right = checksum(tmp_path / "102flowers.tgz")
    (tmp_path / "102flowers.tgz").unlink()
    others = [Remote(r.name, None, checksum(tmp_path / r.name)) for r in layouts.FLOWERS[1:]]
    wrong = "0" * 32
    monkeypatch.setattr(layouts, "FLOWERS", (Remote("102flowers.tgz", server.url, wrong), *others))
    options = {"download": True, "any_checksum": False}
    with pytest.raises(UserError, match=f"MD5 checksum {right}, the official one is {wrong}"):
        prepare("flowers", tmp_path, **options)
    assert not (tmp_path / "jpg").exists()
    monkeypatch.setattr(layouts, "FLOWERS", (Remote("102flowers.tgz", server.url, right), *others))
    assert len(prepare("flowers", tmp_path, **options)) == 306 and server.asked == [0]


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
