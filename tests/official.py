"""Small versions of the four benchmarks' official files: real tar, zip and mat files, one or two images per class."""

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
from vlmclassifier.scoring.class_facts import synsets


def jpeg(number: int) -> bytes:
    """A small image that depends on the number."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, number // 256 % 256, 90)).save(stream, "JPEG")
    return stream.getvalue()


def pack(file: Path, members: dict[str, bytes]) -> Path:
    """Write a tar or zip file of these members; its suffix decides the format and the compression."""
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
    """The cars' annotations of (file name, class number): boxes, class and file name."""
    dtype = [("bbox_x1", "O"), ("bbox_y1", "O"), ("bbox_x2", "O"), ("bbox_y2", "O"), ("class", "O"), ("fname", "O")]
    return np.array([(1, 2, 3, 4, number, name) for name, number in entries], dtype=dtype)


def official_car(name: str) -> str:
    """The official name of a car, which ends with the year."""
    year, rest = name.split(" ", 1)
    return f"{rest} {year}"


def make_flowers(folder: Path) -> list[dict]:
    """Three images per class, one in each official set (train, validation, test). Returns the manifest's rows."""
    names = class_names(BENCHMARKS["flowers"])
    labels = [number % 102 + 1 for number in range(306)]
    sets = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    pack(folder / "102flowers.tgz", {f"jpg/image_{number:05}.jpg": jpeg(number) for number in range(1, 307)})
    (folder / "imagelabels.mat").write_bytes(mat(labels=np.array(labels, dtype=np.uint8)))
    (folder / "setid.mat").write_bytes(mat(**{key: np.array(list(ids), dtype=np.uint16) for key, ids in sets.items()}))
    rows = []
    for number, label in enumerate(labels, start=1):
        split = "train" if number <= 204 else "test"
        rows.append({"image": f"jpg/image_{number:05}.jpg", "label": names[label - 1], "split": split})
    return rows


def make_cars(folder: Path) -> list[dict]:
    """One train and one test image per class, the test images in reverse class order. Returns the manifest's rows."""
    names = class_names(BENCHMARKS["cars"])
    class_order = {"test": range(196, 0, -1), "train": range(1, 197)}
    entries = {}
    for split, order in class_order.items():
        entries[split] = [(f"{number:05}.jpg", class_number) for number, class_number in enumerate(order, start=1)]
    meta = np.array([official_car(name) for name in names], dtype=object)
    pack(folder / "car_devkit.tgz", {
        "devkit/cars_meta.mat": mat(class_names=meta),
        "devkit/cars_train_annos.mat": mat(annotations=annotations(entries["train"])),
    })  # fmt: skip
    (folder / "cars_test_annos_withlabels.mat").write_bytes(mat(annotations=annotations(entries["test"])))
    rows = []
    for split in ("test", "train"):
        members = {}
        for file, class_number in entries[split]:
            image = f"cars_{split}/{file}"
            members[image] = jpeg(class_number)
            rows.append({"image": image, "label": names[class_number - 1], "split": split})
        pack(folder / f"cars_{split}.tgz", members)
    return rows


CALTECH_FOLDERS = {"face": ["Faces", "Faces_easy"], "leopard": ["Leopards"], "motorbike": ["Motorbikes"],
                   "airplane": ["airplanes"]}  # fmt: skip


def make_caltech(folder: Path) -> list[dict]:
    """Two images per class folder and a background folder. Returns the manifest's rows without splits, in order."""
    members, rows = {}, []
    for name in class_names(BENCHMARKS["caltech"]):
        for class_folder in CALTECH_FOLDERS.get(name, [name.replace(" ", "_")]):
            for number in (1, 2):
                path = f"101_ObjectCategories/{class_folder}/image_{number:04}.jpg"
                members[path] = jpeg(len(members))
                rows.append({"image": path, "label": name})
    members["101_ObjectCategories/BACKGROUND_Google/image_0001.jpg"] = jpeg(999)
    tar = pack(folder / "inner.tar.gz", members)
    pack(folder / "caltech-101.zip", {"caltech-101/101_ObjectCategories.tar.gz": tar.read_bytes(),
                                      "__MACOSX/x": b""})  # fmt: skip
    tar.unlink()
    return sorted(rows, key=lambda row: row["image"])


def make_imagenet(folder: Path) -> list[dict]:
    """One validation image per class, not in class order, as a tar file and a devkit. Returns the manifest's rows."""
    names, wnids = class_names(BENCHMARKS["imagenet"]), synsets()
    class_indices = [number * 7 % 1000 for number in range(1000)]  # of each image
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    entries = np.array([(1000 - index, wnids[index], names[index]) for index in range(1000)], dtype=dtype)
    entries = np.append(entries, np.array([(1001, "n00000001", "an inner node")], dtype=dtype))
    truth = "".join(f"{1000 - index}\n" for index in class_indices).encode()
    pack(folder / "ILSVRC2012_devkit_t12.tar.gz", {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=entries),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth,
    })  # fmt: skip
    members, rows = {}, []
    for number, index in enumerate(class_indices):
        file = f"ILSVRC2012_val_{number + 1:08}.JPEG"
        members[file] = jpeg(number)
        rows.append({"image": f"val/{file}", "label": names[index], "split": "valid", "label_idx": index,
                     "imagenet_label": wnids[index]})  # fmt: skip
    pack(folder / "ILSVRC2012_img_val.tar", members)
    return sorted(rows, key=lambda row: row["label_idx"])


MAKERS = {"flowers": make_flowers, "cars": make_cars, "imagenet": make_imagenet}


def tar_with_link(link_type: bytes) -> bytes:
    """A tar file that contains a link of this type."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as opened:
        info = tarfile.TarInfo("jpg/image_00001.jpg")
        info.type, info.linkname = link_type, "jpg/image_00002.jpg"
        opened.addfile(info)
    return stream.getvalue()


def read_manifest(file: Path) -> list[dict]:
    """The rows of a manifest."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prepare(benchmark: str, folder: Path, /, **options: object) -> list[dict]:
    """Run the script's main on the official files in `folder`. Returns the manifest's rows."""
    module = script("scripts/prepare_data.py")
    defaults = {"archives": folder, "out": folder / "out", "data_root": folder, "download": False, "any_checksum": True}
    args = module.Args(benchmark, **(defaults | options))
    module.main(args)
    return read_manifest(args.out / f"{benchmark}.jsonl")
