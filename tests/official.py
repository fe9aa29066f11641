"""The official layouts of the four benchmarks in small: real tar, zip and mat files, one or two pictures a class."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from conftest import script
from PIL import Image
from scipy.io import savemat

from vlmclassifier.benchmarks import BENCHMARKS, class_names
from vlmclassifier.scoring.special import synsets


def jpeg(number: int) -> bytes:
    """A small picture that differs from number to number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def pack(file: Path, members: dict[str, bytes]) -> Path:
    """A tar (by its name packed) or zip file of these members."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w") as opened:
            for name, data in members.items():
                opened.writestr(name, data)
        return file
    with tarfile.open(file, "w:gz" if file.suffix in (".tgz", ".gz") else "w") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return file


def mat(**variables: object) -> bytes:
    """A MATLAB file of these variables."""
    stream = io.BytesIO()
    savemat(stream, variables)
    return stream.getvalue()


def annotations(entries: list[tuple[str, int]]) -> np.ndarray:
    """The cars' annotations: boxes, class and file name."""
    kind = [("bbox_x1", "O"), ("bbox_y1", "O"), ("bbox_x2", "O"), ("bbox_y2", "O"), ("class", "O"), ("fname", "O")]
    return np.array([(1, 2, 3, 4, number, name) for name, number in entries], dtype=kind)


def official_car(name: str) -> str:
    """The official name of a car: the year last."""
    year, rest = name.split(" ", 1)
    return f"{rest} {year}"


def make_flowers(folder: Path) -> list[dict]:
    """Three pictures a class: one each of the official train, validation and test sets. Returns the manifest's rows."""
    names = class_names(BENCHMARKS["flowers"])
    labels = [number % 102 + 1 for number in range(306)]
    sets = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    pack(folder / "102flowers.tgz", {f"jpg/image_{n:05}.jpg": jpeg(n) for n in range(1, 307)})
    (folder / "imagelabels.mat").write_bytes(mat(labels=np.array(labels, dtype=np.uint8)))
    (folder / "setid.mat").write_bytes(mat(**{key: np.array(list(ids), dtype=np.uint16) for key, ids in sets.items()}))
    return [
        {"image": f"jpg/image_{n:05}.jpg", "label": names[labels[n - 1] - 1], "split": "test" if n > 204 else "train"}
        for n in range(1, 307)
    ]


def make_cars(folder: Path) -> list[dict]:
    """One train and one test picture a class, the classes of the test pictures backwards."""
    names = class_names(BENCHMARKS["cars"])
    test, train = ([(f"{n + 1:05}.jpg", number) for n, number in enumerate(order)]
                   for order in (range(196, 0, -1), range(1, 197)))  # fmt: skip
    meta = np.array([official_car(name) for name in names], dtype=object)
    pack(folder / "car_devkit.tgz", {"devkit/cars_meta.mat": mat(class_names=meta),
                                     "devkit/cars_train_annos.mat": mat(annotations=annotations(train))})  # fmt: skip
    (folder / "cars_test_annos_withlabels.mat").write_bytes(mat(annotations=annotations(test)))
    for split, rows in (("train", train), ("test", test)):
        pack(folder / f"cars_{split}.tgz", {f"cars_{split}/{file}": jpeg(number) for file, number in rows})
    return [{"image": f"cars_{split}/{file}", "label": names[number - 1], "split": split}
            for split, rows in (("test", test), ("train", train)) for file, number in rows]  # fmt: skip


CALTECH_FOLDERS = {"face": ["Faces", "Faces_easy"], "leopard": ["Leopards"], "motorbike": ["Motorbikes"],
                   "airplane": ["airplanes"]}  # fmt: skip


def make_caltech(folder: Path) -> list[dict]:
    """Two pictures a folder, a background folder among them; returns the rows without their splits, in order."""
    names, members, rows = class_names(BENCHMARKS["caltech"]), {}, []
    for name in names:
        for inner in CALTECH_FOLDERS.get(name, [name.replace(" ", "_")]):
            for n in (1, 2):
                path = f"101_ObjectCategories/{inner}/image_{n:04}.jpg"
                members[path] = jpeg(len(members))
                rows.append({"image": path, "label": name})
    members["101_ObjectCategories/BACKGROUND_Google/image_0001.jpg"] = jpeg(999)
    inner = pack(folder / "inner.tar.gz", members)
    pack(folder / "caltech-101.zip", {"caltech-101/101_ObjectCategories.tar.gz": inner.read_bytes(),
                                      "__MACOSX/x": b""})  # fmt: skip
    inner.unlink()
    return sorted(rows, key=lambda row: row["image"])


def make_imagenet(folder: Path) -> list[dict]:
    """One validation picture a class, in another order than that of the classes, as a tar file and a devkit."""
    names, wnids = class_names(BENCHMARKS["imagenet"]), synsets()
    order = [number * 7 % 1000 for number in range(1000)]  # picture -> class index
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    entries = np.array([(1000 - index, wnids[index], names[index]) for index in range(1000)], dtype=kind)
    entries = np.append(entries, np.array([(1001, "n00000001", "an inner node")], dtype=kind))
    truth = "".join(f"{1000 - index}\n" for index in order).encode()
    pack(folder / "ILSVRC2012_devkit_t12.tar.gz", {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=entries),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth,
    })  # fmt: skip
    pack(folder / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{n + 1:08}.JPEG": jpeg(n) for n in range(1000)})
    rows = [{"image": f"val/ILSVRC2012_val_{n + 1:08}.JPEG", "label": names[index], "split": "valid",
             "label_idx": index, "imagenet_label": wnids[index]} for n, index in enumerate(order)]  # fmt: skip
    return sorted(rows, key=lambda row: row["label_idx"])


MAKERS = {"flowers": make_flowers, "cars": make_cars, "imagenet": make_imagenet}


def link(kind: bytes) -> bytes:
    """A tar file that holds a link of this kind."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as opened:
        info = tarfile.TarInfo("jpg/image_00001.jpg")
        info.type, info.linkname = kind, "jpg/image_00002.jpg"
        opened.addfile(info)
    return stream.getvalue()


def read(file: Path) -> list[dict]:
    """The rows of a manifest."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prepare(benchmark: str, folder: Path, /, **options: object) -> list[dict]:
    """The script's main on the archives in `folder`; the manifest's rows."""
    module = script("scripts/prepare_data.py")
    given = {"archives": folder, "out": folder / "out", "data_root": folder, "download": False, "any_checksum": True}
    args = module.Args(benchmark, **(given | options))
    module.main(args)
    return read(args.out / f"{benchmark}.jsonl")
