"""The official files of the four benchmarks, as archives or unpacked as torchvision's data set classes expect them."""

import csv
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmclassifier.images import SUFFIXES
from vlmclassifier.preparing.archives import unpack
from vlmclassifier.preparing.downloads import RemoteFile, find_or_fetch
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.records import UserError
from vlmclassifier.scoring.class_facts import synsets

OXFORD_URL = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
# The checksums are those in torchvision's source code (cars: version 0.15, the last one that downloaded them).
FLOWERS = (
    RemoteFile("102flowers.tgz", OXFORD_URL + "102flowers.tgz", "52808999861908f626f3c1f4e79d11fa"),
    RemoteFile("imagelabels.mat", OXFORD_URL + "imagelabels.mat", "e0620be6f572b9609742df49c70aed4d"),
    RemoteFile("setid.mat", OXFORD_URL + "setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c"),
)
CARS = (
    RemoteFile("car_devkit.tgz", None, "c3b158d763b6e2245038c8ad08e45376"),
    RemoteFile("cars_train.tgz", None, "065e5b463ae28d29e77c1b4b166cfe61"),
    RemoteFile("cars_test.tgz", None, "4ce7ebf6a94d07f1952d94dd34c4d501"),
    RemoteFile("cars_test_annos_withlabels.mat", None, "b0a2b23655a3edd16d84508592a98d10"),
)
CALTECH = (
    RemoteFile("caltech-101.zip", "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
               "3138e1922a9193bfa496528edbbc45d0"),
    RemoteFile("101_ObjectCategories.tar.gz", None, None),  # it is inside the zip file
)  # fmt: skip
KAGGLE_SOLUTION = "LOC_val_solution.csv"
IMAGENET = (
    RemoteFile("ILSVRC2012_img_val.tar", None, "29b22e2961454d5413ddabcf34fc5622"),
    RemoteFile("ILSVRC2012_devkit_t12.tar.gz", None, "fa75699e90414af021442c21a62c3abf"),
)
TORCHVISION_FOLDERS = {"flowers": "flowers-102", "cars": "stanford_cars", "caltech": "caltech101"}
CARS_REMEDY = (
    "the official address of StanfordCars is dead; put copies of car_devkit.tgz, cars_train.tgz, cars_test.tgz and "
    "cars_test_annos_withlabels.mat there, packed or unpacked (data/README.md)"
)
IMAGENET_REMEDY = (
    "ImageNet requires a registration at image-net.org; put the file there, or the validation images in val/WNID/"
)


@dataclass(frozen=True)
class Row:
    """One image file of a data set; `extra_fields` are further fields of its manifest row."""

    image: Path
    class_index: int
    split: str
    extra_fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a benchmark's official files are, and whether missing ones may be downloaded.

    Files are unpacked and downloaded into `folder`. `archives` is a second folder with official files.
    """

    folder: Path
    download: bool = True
    any_checksum: bool = False
    archives: Path | None = None

    def for_benchmark(self, key: str) -> "Source":
        """This source with torchvision's subfolder of the benchmark, such as flowers-102, where it exists."""
        name = TORCHVISION_FOLDERS.get(key, "")
        archives = subfolder_or_self(self.archives, name) if self.archives else None
        return replace(self, folder=subfolder_or_self(self.folder, name), archives=archives)

    @property
    def folders(self) -> list[Path]:
        """The folders to search for official files, packed or unpacked."""
        if self.archives is None or self.archives == self.folder:
            return [self.folder]
        return [self.folder, self.archives]

    def file(self, remote: RemoteFile, remedy: str = "run without --no-download") -> Path:
        """Return an official file, downloaded if needed and possible.

        `remedy`: what the user can do when the file is missing. Raises UserError when it is missing or damaged.
        """
        return find_or_fetch(remote, self.folders, self.download, self.any_checksum, remedy)

    def unpacked(
        self, name: str, remote: RemoteFile, remedy: str = "run without --no-download", has_top_folder: bool = True
    ) -> Path:
        """Return the folder `name` of an archive, unpacked if needed.

        `has_top_folder`: whether the folder is in the archive; if not, it is created for the archive's files.

        Raises UserError when the archive is missing, damaged or a different one.
        """
        for folder in self.folders:
            if (folder / name).is_dir():
                return folder / name
        archive = self.file(remote, remedy)
        unpack(archive, self.folder, subfolder="" if has_top_folder else name, expected=name)
        if not (self.folder / name).is_dir():
            raise UserError(f"{archive} does not contain {name}: it is a different archive; get the official one.")
        return self.folder / name


def subfolder_or_self(folder: Path, name: str) -> Path:
    """FOLDER/NAME where that is a folder, else FOLDER."""
    return folder / name if (folder / name).is_dir() else folder


def flowers_images(source: Source) -> dict[str, Path]:
    """The folder of Flowers102's images, by its name in the paper's paths (jpg/...)."""
    return {"jpg": source.unpacked("jpg", FLOWERS[0])}


def read_flowers(source: Source, finder: ClassFinder) -> list[Row]:
    """Flowers102 in the order of its image numbers; the train split is the official train and validation sets.

    Raises UserError when a file is missing, damaged or of another data set.
    """
    folder = flowers_images(source)["jpg"]
    _, labels_file, splits_file = FLOWERS
    labels = _read_numbers(source.file(labels_file), "labels", len(finder.names))
    splits_path = source.file(splits_file)
    split_of: dict[int, str] = {}
    total = 0
    for key, split in (("trnid", "train"), ("valid", "train"), ("tstid", "test")):
        numbers = _read_numbers(splits_path, key, len(labels))
        total += len(numbers)
        for number in numbers:
            split_of[number] = split
    if len(split_of) != len(labels) or total != len(labels):
        raise UserError(
            f"{source.folder / splits_file.name} does not assign each of the {len(labels)} images of "
            f"{labels_file.name} to one split: the files belong to different data sets; get the official ones."
        )
    finder.check_complete([label - 1 for label in labels], str(source.folder / labels_file.name))
    rows = []
    for number, label in enumerate(labels, start=1):
        rows.append(Row(folder / f"image_{number:05}.jpg", label - 1, split_of[number]))
    return rows


def cars_images(source: Source) -> dict[str, Path]:
    """The folders of StanfordCars' images, by their names in the paper's paths (cars_train/..., cars_test/...)."""
    folders = {}
    for name, remote in (("cars_train", CARS[1]), ("cars_test", CARS[2])):
        folder = source.unpacked(name, remote, CARS_REMEDY)
        folders[name] = subfolder_or_self(folder, name)  # some copies contain cars_train/cars_train/00001.jpg
    return folders


def read_cars(source: Source, finder: ClassFinder) -> list[Row]:
    """StanfordCars, test images first, as in the paper's manifest.

    Raises UserError when a file is missing, damaged or of another data set.
    """
    folders = cars_images(source)
    devkit = source.unpacked("devkit", CARS[0], CARS_REMEDY)
    test_annotations = devkit / CARS[3].name  # some copies have it in the devkit
    if not test_annotations.is_file():
        test_annotations = source.file(CARS[3], CARS_REMEDY)
    names = [str(name) for name in _read_variable(devkit / "cars_meta.mat", "class_names")]
    classes = finder.find_all(names, str(devkit / "cars_meta.mat"))
    finder.check_complete(classes, str(devkit / "cars_meta.mat"))
    rows = []
    for split, file in (("test", test_annotations), ("train", devkit / "cars_train_annos.mat")):
        for name, number in _read_annotations(file, len(classes)):
            rows.append(Row(folders[f"cars_{split}"] / name, classes[number - 1], split))
    return rows


def caltech_images(source: Source) -> dict[str, Path]:
    """The folder of Caltech101's images, by its name in the paper's paths (101_ObjectCategories/...)."""
    zip_file, tar_file = CALTECH
    name = "101_ObjectCategories"
    # The tar file, or what was unpacked from it by hand, may be in the folder of the unpacked zip file.
    candidates = [*source.folders, *[folder / "caltech-101" for folder in source.folders]]
    for folder in candidates:
        if (folder / name).is_dir():
            return {name: folder / name}
    tar_folder = next((folder for folder in candidates if (folder / tar_file.name).is_file()), None)
    if tar_folder is None:
        tar_folder = source.unpacked("caltech-101", zip_file)
    tar_source = replace(source, archives=tar_folder)
    return {name: tar_source.unpacked(name, tar_file, f"remove {tar_folder} and run again")}


def read_caltech(source: Source, finder: ClassFinder) -> list[Row]:
    """Caltech101 by folder and file name. It has no official split: every row has the split "all".

    Raises UserError when an archive is missing or damaged, or when a class is missing.
    """
    folder = caltech_images(source)["101_ObjectCategories"]
    rows = read_class_folders(folder, finder, "all")
    finder.check_complete({row.class_index for row in rows}, str(folder))
    return rows


def read_imagenet(source: Source, finder: ClassFinder) -> list[Row]:
    """ImageNet's validation set, and its train set if train/WNID/ exists, by class and file name.

    Raises UserError when a file is missing or damaged, or when a class of the validation set is missing.
    """
    rows = []
    kaggle = [folder / "ILSVRC" / "Data" / "CLS-LOC" for folder in source.folders]
    for name, split in (("val", "valid"), ("train", "train")):
        for folder in (*source.folders, *kaggle):
            if _has_subfolders(folder / name):
                rows += read_class_folders(folder / name, finder, split)
                break
    solutions = [folder / KAGGLE_SOLUTION for folder in source.folders if (folder / KAGGLE_SOLUTION).is_file()]
    if not any(row.split == "valid" for row in rows) and solutions:
        rows += _read_kaggle_validation_set(solutions[0])
    elif not any(row.split == "valid" for row in rows):
        rows += _read_flat_validation_set(source)
    finder.check_complete({row.class_index for row in rows if row.split == "valid"}, str(source.folder / "val"))
    rows.sort(key=lambda row: (row.split, row.class_index, row.image.name))
    return [replace(row, extra_fields=imagenet_fields(row.class_index)) for row in rows]


def imagenet_fields(class_index: int) -> dict[str, Any]:
    """Further fields of ImageNet's manifest rows: two names are shared by two classes, so a label is not enough."""
    return {"label_idx": class_index, "imagenet_label": synsets()[class_index]}


def _read_flat_validation_set(source: Source) -> list[Row]:
    """The validation images as in ILSVRC2012_img_val.tar, without class folders; their classes are in the devkit."""
    folder = source.unpacked("val", IMAGENET[0], IMAGENET_REMEDY, has_top_folder=False)
    devkit = source.unpacked("ILSVRC2012_devkit_t12", IMAGENET[1], IMAGENET_REMEDY) / "data"
    meta = _read_variable(devkit / "meta.mat", "synsets")
    try:
        wnids = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in meta}
        numbers = [int(line) for line in (devkit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()]
        classes = [synsets().index(wnids[number]) for number in numbers]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{devkit} is not the devkit of ILSVRC 2012 ({error}): get the official one.") from None
    rows = []
    for number, class_index in enumerate(classes, start=1):
        rows.append(Row(folder / f"ILSVRC2012_val_{number:08}.JPEG", class_index, "valid"))
    return rows


def _read_kaggle_validation_set(solution: Path) -> list[Row]:
    """The validation images as in Kaggle's download, whose classes are in LOC_val_solution.csv."""
    folder, rows = solution.parent / "ILSVRC" / "Data" / "CLS-LOC" / "val", []
    with open(solution, newline="", encoding="utf-8-sig") as stream:
        for number, entry in enumerate(csv.DictReader(stream), start=2):
            try:
                image, wnid = entry["ImageId"], entry["PredictionString"].split()[0]
                rows.append(Row(folder / f"{image}.JPEG", synsets().index(wnid), "valid"))
            except (KeyError, ValueError, IndexError, AttributeError):
                raise UserError(
                    f"{solution} row {number} has no image and WordNet id: get Kaggle's file again."
                ) from None
    return rows


def _has_subfolders(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())


def is_visible(path: Path, folder: Path) -> bool:
    """Whether a path below `folder` is data: neither hidden, such as macOS's ._x.jpg, nor in a __MACOSX folder."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def _is_utf8(name: str) -> bool:
    """Whether a file name is valid UTF-8: Python represents any other byte of a file name as a surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def read_class_folders(folder: Path, finder: ClassFinder, split: str) -> list[Row]:
    """The images below FOLDER/CLASS/, by folder and file name.

    Raises UserError for an unknown class and for a file name that is not UTF-8.
    """
    rows = []
    for class_folder in sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_visible(entry, folder)):
        index = finder.find(class_folder.name, str(folder))
        if index is None:
            continue
        files = sorted(file for file in class_folder.rglob("*") if is_visible(file, class_folder))
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        if skipped := [file for file in files if file.is_file() and file.suffix.lower() not in SUFFIXES]:
            print(
                f"{class_folder}: {len(skipped)} files are not taken, such as {skipped[0].name}: they have none of the "
                f"suffixes {' '.join(SUFFIXES)}", file=sys.stderr,
            )  # fmt: skip
        for image in images:
            if not _is_utf8(str(image)):
                raise UserError(
                    f"The file name {os.fsencode(image)!r} is not UTF-8 and cannot be written to a manifest: rename "
                    "the file."
                )
            rows.append(Row(image, index, split))
    return rows


def _read_variable(file: Path, key: str) -> list:
    """The entries of one variable of a MATLAB file. Raises UserError when the file does not exist or lacks it."""
    from scipy.io import loadmat

    try:
        return _to_list(loadmat(file, squeeze_me=True)[key])
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: get the official file (data/README.md).") from None
    except Exception as error:  # a damaged file raises any type: zlib.error, IndexError, OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{file} has no variable {key!r} ({type(error).__name__}): it belongs to another data set or is damaged; "
            "get the official file."
        ) from None


def _to_list(values: Any) -> list:
    import numpy as np

    array = np.atleast_1d(np.asarray(values))
    if array.dtype.names is None:
        return array.tolist()
    return list(array)  # structured records, which keep their field names


def _read_numbers(file: Path, key: str, maximum: int) -> list[int]:
    """The whole numbers of one variable of a MATLAB file. Raises UserError unless all are from 1 to `maximum`."""
    numbers = _read_variable(file, key)
    for number in numbers:
        if not (isinstance(number, int) and 1 <= number <= maximum):
            raise UserError(
                f"{file} has {number!r} in its variable {key!r}, which is not a number from 1 to {maximum}: it belongs "
                "to another data set; get the official file."
            )
    return numbers


def _read_annotations(file: Path, class_count: int) -> Sequence[tuple[str, int]]:
    """The file name and the class number, from 1, of every car. Raises UserError when the file does not have them."""
    entries = _read_variable(file, "annotations")
    try:
        annotations = [(str(entry["fname"]), int(entry["class"])) for entry in entries]
    except (ValueError, IndexError, TypeError, KeyError):
        raise UserError(
            f"{file} has no file names with classes (nor has cars_test_annos.mat of the devkit): get the official "
            "cars_train_annos.mat and cars_test_annos_withlabels.mat."
        ) from None
    for _, number in annotations:
        if not 1 <= number <= class_count:
            raise UserError(
                f"{file} has the class number {number}, which is not from 1 to {class_count}: it belongs to another "
                "data set; get the official file."
            )
    return annotations


READERS: dict[str, Callable[[Source, ClassFinder], list[Row]]] = {
    "flowers": read_flowers, "cars": read_cars, "caltech": read_caltech, "imagenet": read_imagenet,
}  # fmt: skip
IMAGE_FOLDERS: dict[str, Callable[[Source], dict[str, Path]]] = {
    "flowers": flowers_images, "cars": cars_images, "caltech": caltech_images,
}  # fmt: skip
