"""The official archives of the four benchmarks, packed or as torchvision's data set classes lay them out."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmclassifier.preparing.archives import unpack
from vlmclassifier.preparing.downloads import Remote, find_or_fetch
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError
from vlmclassifier.scoring.special import synsets

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
# Checksums: torchvision's sources (those of the cars: its version 0.15, the last that downloaded them).
FLOWERS = (
    Remote("102flowers.tgz", OXFORD + "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
    Remote("imagelabels.mat", OXFORD + "imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
    Remote("setid.mat", OXFORD + "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
)
CARS = (
    Remote("car_devkit.tgz", None, "c3b158d763b6e2245038c8ad08e45376"),
    Remote("cars_train.tgz", None, "065e5b463ae28d29e77c1b4b166cfe61"),
    Remote("cars_test.tgz", None, "4ce7ebf6a94d07f1952d94dd34c4d501"),
    Remote("cars_test_annos_withlabels.mat", None, "b0a2b23655a3edd16d84508592a98d10"),
)
CALTECH = (
    Remote("caltech-101.zip", "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
           "3138e1922a9193bfa496528edbbc45d0"),
    Remote("101_ObjectCategories.tar.gz", None, None),  # what the zip file holds
)  # fmt: skip
IMAGENET = (
    Remote("ILSVRC2012_img_val.tar", None, "29b22e2961454d5413ddabcf34fc5622"),
    Remote("ILSVRC2012_devkit_t12.tar.gz", None, "fa75699e90414af021442c21a62c3abf"),
)
INNER = {"flowers": "flowers-102", "cars": "stanford_cars", "caltech": "caltech101"}  # torchvision's folders
CARS_GONE = (
    "the official address of StanfordCars is dead; put copies of car_devkit.tgz, cars_train.tgz, cars_test.tgz and "
    "cars_test_annos_withlabels.mat there, packed or unpacked (data/README.md)"
)
IMAGENET_CLOSED = "ImageNet wants a registration at image-net.org; put the file there, or its pictures in val/WNID/"


@dataclass(frozen=True)
class Row:
    """One picture of a data set: `image` is its file, `more` what its manifest row holds beyond the usual."""

    image: Path
    class_index: int
    split: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where the official files lie (`folder`, or packed in `archives`), and what may be done to get them."""

    folder: Path
    download: bool = True
    any_checksum: bool = False
    archives: Path | None = None

    def of(self, key: str) -> "Place":
        """The folders in which torchvision's class of this benchmark wants the files, where there are such."""
        folder, archives = (
            place / INNER.get(key, "") if place and (place / INNER.get(key, "")).is_dir() else place
            for place in (self.folder, self.archives)
        )
        return replace(self, folder=folder, archives=archives)

    @property
    def folders(self) -> list[Path]:
        """Where official files may lie, packed or unpacked."""
        return list(dict.fromkeys(folder for folder in (self.folder, self.archives) if folder))

    def file(self, remote: Remote, where: str = "") -> Path:
        """An official file, downloaded where it may be."""
        return find_or_fetch(remote, self.folders, self.download, self.any_checksum, where or "leave --no-download out")

    def unpacked(self, name: str, remote: Remote, where: str = "", bare: bool = False) -> Path:
        """The folder `name` of an archive, unpacked where it is not there yet; `bare`: the archive has no folder."""
        for folder in self.folders:
            if (folder / name).is_dir():
                return folder / name
        archive, folder = self.file(remote, where), self.folder / name
        unpack(archive, self.folder, name if bare else "", name)
        if not folder.is_dir():
            raise UserError(f"{archive} does not hold {name}: it is another archive; get the official one.")
        return folder


def flowers_pictures(place: Place) -> dict[str, Path]:
    """The folders of Flowers102's pictures, by their names in the paper's paths (jpg/...)."""
    return {"jpg": place.unpacked("jpg", FLOWERS[0])}


def read_flowers(place: Place, finder: ClassFinder) -> list[Row]:
    """Flowers102 in the order of its picture numbers; the train split is the official train and validation sets."""
    folder = flowers_pictures(place)["jpg"]
    labels = _numbers(place.file(FLOWERS[1]), "labels", len(finder.names))
    sets = {key: _numbers(place.file(FLOWERS[2]), key, len(labels)) for key in ("trnid", "valid", "tstid")}
    split_of = {number: "test" if key == "tstid" else "train" for key, numbers in sets.items() for number in numbers}
    if len(split_of) != len(labels) or sum(map(len, sets.values())) != len(labels):
        raise UserError(
            f"{place.folder / FLOWERS[2].name} does not divide the {len(labels)} pictures of {FLOWERS[1].name}: they "
            "are of different data sets; get the official ones."
        )
    finder.check_complete([label - 1 for label in labels], str(place.folder / FLOWERS[1].name))
    return [
        Row(folder / f"image_{number:05}.jpg", label - 1, split_of[number])
        for number, label in enumerate(labels, start=1)
    ]


def cars_pictures(place: Place) -> dict[str, Path]:
    """The folders of StanfordCars' pictures, by their names in the paper's paths (cars_train/..., cars_test/...)."""
    packed = {"cars_train": CARS[1], "cars_test": CARS[2]}
    return {name: nested(place.unpacked(name, remote, CARS_GONE)) for name, remote in packed.items()}


def read_cars(place: Place, finder: ClassFinder) -> list[Row]:
    """StanfordCars, test pictures first, as in the paper's manifest."""
    folders = cars_pictures(place)
    devkit = place.unpacked("devkit", CARS[0], CARS_GONE)
    annotated = devkit / CARS[3].name  # some copies have it there
    test = annotated if annotated.is_file() else place.file(CARS[3], CARS_GONE)
    names = [str(name) for name in _matrix(devkit / "cars_meta.mat", "class_names")]
    classes = finder.find_all(names, str(devkit / "cars_meta.mat"))
    finder.check_complete(classes, str(devkit / "cars_meta.mat"))
    rows = []
    for split, file in (("test", test), ("train", devkit / "cars_train_annos.mat")):
        for name, number in _annotations(file, len(classes)):
            rows.append(Row(folders[f"cars_{split}"] / name, classes[number - 1], split))
    return rows


def nested(folder: Path) -> Path:
    """Some copies hold cars_train/cars_train/00001.jpg."""
    return folder / folder.name if (folder / folder.name).is_dir() else folder


def caltech_pictures(place: Place) -> dict[str, Path]:
    """The folder of Caltech101's pictures, by its name in the paper's paths (101_ObjectCategories/...)."""
    (zipped, tar), name = CALTECH, "101_ObjectCategories"
    inner = [folder / "caltech-101" for folder in place.folders]  # the tar file may have been unpacked beside itself
    found = next((folder / name for folder in (*place.folders, *inner) if (folder / name).is_dir()), None)
    if found is None:
        packed = next((folder for folder in (*place.folders, *inner) if (folder / tar.name).is_file()), None)
        packed = packed or place.unpacked("caltech-101", zipped)
        found = replace(place, archives=packed).unpacked(name, tar, f"remove {packed} and run again")
    return {name: found}


def read_caltech(place: Place, finder: ClassFinder) -> list[Row]:
    """Caltech101 by folder and file name. It has no official split: every row is "all"."""
    folder = caltech_pictures(place)["101_ObjectCategories"]
    rows = class_folders(folder, finder, "all")
    finder.check_complete({row.class_index for row in rows}, str(folder))
    return rows


def read_imagenet(place: Place, finder: ClassFinder) -> list[Row]:
    """ImageNet's validation set, and its train set where train/WNID/ is there, by class and file name."""
    rows = []
    for name, split in (("val", "valid"), ("train", "train")):
        folder = next((folder / name for folder in place.folders if _has_classes(folder / name)), None)
        rows += class_folders(folder, finder, split) if folder else []
    if not any(row.split == "valid" for row in rows):
        rows += _flat_validation_set(place)
    finder.check_complete({row.class_index for row in rows if row.split == "valid"}, str(place.folder / "val"))
    ordered = sorted(rows, key=lambda row: (row.split, row.class_index, row.image.name))
    return [Row(r.image, r.class_index, r.split, imagenet_fields(r.class_index)) for r in ordered]


def imagenet_fields(class_index: int) -> dict[str, Any]:
    """What ImageNet's manifest rows hold beyond the usual: the class index, since two names are shared."""
    return {"label_idx": class_index, "imagenet_label": synsets()[class_index]}


def _flat_validation_set(place: Place) -> list[Row]:
    """The validation pictures as ILSVRC2012_img_val.tar holds them, their classes from the devkit."""
    folder = place.unpacked("val", IMAGENET[0], IMAGENET_CLOSED, bare=True)
    devkit = place.unpacked("ILSVRC2012_devkit_t12", IMAGENET[1], IMAGENET_CLOSED) / "data"
    meta = _matrix(devkit / "meta.mat", "synsets")
    try:
        wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in meta}
        numbers = [int(line) for line in (devkit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()]
        classes = [synsets().index(wnids[number]) for number in numbers]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{devkit} is not ILSVRC 2012's devkit ({error}): get the official one.") from None
    return [
        Row(folder / f"ILSVRC2012_val_{number:08}.JPEG", index, "valid")
        for number, index in enumerate(classes, start=1)
    ]


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def is_wanted(path: Path, folder: Path) -> bool:
    """Whether a path is somebody's own, not a hidden file or folder, macOS's ._x.jpg, or its __MACOSX."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def _is_text(name: str) -> bool:
    """Whether a name is text: Python keeps other bytes of a file name as half characters."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def class_folders(folder: Path, finder: ClassFinder, split: str) -> list[Row]:
    """The pictures below FOLDER/CLASS/, by folder and file name."""
    rows = []
    for inner in sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_wanted(entry, folder)):
        index = finder.find(inner.name, str(folder))
        if index is None:
            continue
        files = sorted(file for file in inner.rglob("*") if is_wanted(file, inner) and file.suffix.lower() in PICTURES)
        if odd := next((os.fsencode(file) for file in files if not _is_text(str(file))), None):
            raise UserError(f"The file name {odd!r} is not UTF-8 and would not fit a manifest: rename the file.")
        rows += [Row(file, index, split) for file in files]
    return rows


def _matrix(file: Path, key: str) -> list:
    """The entries of one variable of a MATLAB file. Raises UserError where the file does not have it."""
    from scipy.io import loadmat

    try:
        return _listed(loadmat(file, squeeze_me=True)[key])
    except FileNotFoundError:
        raise UserError(f"{file} is absent: get the official file (data/README.md).") from None
    except Exception as error:  # a damaged file raises any kind: zlib.error, IndexError, OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{file} holds no {key!r} ({type(error).__name__}): it is of another data set or broken; get the official "
            "one."
        ) from None


def _listed(values: Any) -> list:
    import numpy as np

    array = np.atleast_1d(np.asarray(values))
    return array.tolist() if array.dtype.names is None else list(array)


def _numbers(file: Path, key: str, most: int) -> list[int]:
    """The whole numbers of one variable, from 1 to `most`. Raises UserError for any others."""
    found = _matrix(file, key)
    if wrong := [value for value in found if not (isinstance(value, int) and 1 <= value <= most)]:
        raise UserError(
            f"{file} has {wrong[0]!r} among its {key!r}, not a number from 1 to {most}: it is of another data set; get "
            "the official file."
        )
    return found


def _annotations(file: Path, classes: int) -> Sequence[tuple[str, int]]:
    """File name and class number of every car."""
    entries = _matrix(file, "annotations")
    try:
        found = [(str(entry["fname"]), int(entry["class"])) for entry in entries]
    except (ValueError, IndexError, TypeError, KeyError):
        raise UserError(
            f"{file} has no file names with classes (cars_test_annos.mat has none, either): get the official one."
        ) from None
    if wrong := [number for _, number in found if not 1 <= number <= classes]:
        raise UserError(f"{file} has the class number {wrong[0]}, outside 1 to {classes}: it is of another data set.")
    return found


READERS: dict[str, Callable[[Place, ClassFinder], list[Row]]] = {
    "flowers": read_flowers, "cars": read_cars, "caltech": read_caltech, "imagenet": read_imagenet,
}  # fmt: skip
PICTURE_FOLDERS: dict[str, Callable[[Place], dict[str, Path]]] = {
    "flowers": flowers_pictures, "cars": cars_pictures, "caltech": caltech_pictures,
}  # fmt: skip
