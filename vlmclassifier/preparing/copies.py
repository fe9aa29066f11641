"""Third-party copies of a data set: a Hugging Face `datasets` repository, parquet files, or folders of images."""

import base64
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.preparing.loading import SPLITS, load_tables, reason
from vlmclassifier.preparing.official import Row, imagenet_fields, is_visible, read_class_folders
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LABEL_COLUMNS = (  # usual names, preferred first
    "label", "labels", "class", "class_name", "fine_label", "target", "cls", "category", "answer",
)  # fmt: skip
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")

IndexReader = Callable[[Any, str], int | None]  # (label, name of the row) -> class index, None for an excluded class


def manifest_split(copy_split: str, key: str) -> str:
    """The manifest's split for a split of a copy, "" if unknown; Flowers' validation set is in the train split."""
    split = SPLITS.get(copy_split.lower(), "")
    return "train" if key == "flowers" and split == "valid" else split


def read_folder(folder: Path, finder: ClassFinder) -> list[Row]:
    """Return the images of FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/, by split, class folder and file name.

    Raises UserError when there is no class folder, or when a class is missing.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder} is not a folder: give a folder that contains one folder for each class.")
    key = finder.benchmark.key
    subfolders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_visible(entry, folder))
    split_folders = [entry for entry in subfolders if manifest_split(entry.name, key)]
    rows = []
    if split_folders:
        for entry in subfolders:
            if entry not in split_folders:
                raise UserError(
                    f"{folder} contains split folders ({split_folders[0].name}) and another folder ({entry.name}): "
                    "give a folder that contains only split folders or only class folders."
                )
        for entry in split_folders:
            rows += read_class_folders(entry, finder, manifest_split(entry.name, key))
    else:
        rows = read_class_folders(folder, finder, "all")
    finder.check_complete({row.class_index for row in rows}, str(folder))
    return _with_extra_fields(rows, key)


def read_dataset(
    name: str, into: Path, finder: ClassFinder, image_column: str | None, label_column: str | None, overwrite: bool
) -> list[Row]:
    """Write the images of a `datasets` repository, or of a local folder or file of parquet, below `into`; return rows.

    The stored bytes are written unchanged; files that exist already with the same bytes are kept. A split without
    labels, such as ImageNet's test set on the hub, is skipped.

    Raises UserError for a copy that cannot be loaded, lacks the columns or has other classes, and for an existing file
    with a different image, unless `overwrite` is set.
    """
    from tqdm import tqdm

    rows = []
    tables, class_names = load_tables(name)
    for copy_split, table in sorted(tables.items()):
        where = f"{name}, split {copy_split}"
        split = manifest_split(copy_split, finder.benchmark.key) or "all"
        table, images, labels = _select_columns(table, image_column, label_column, where)
        read_index = _index_reader(table, labels, finder, where, class_names)
        bar = tqdm(_iterate(table, where), desc=f"Writing images of {copy_split}", unit="img", disable=None)
        labelled, unlabelled = [], []
        for number, entry in enumerate(bar):
            row_name = f"{where} row {number}"
            if entry[labels] in (None, -1):  # how `datasets` stores a missing label
                unlabelled.append(row_name)
                continue
            index = read_index(entry[labels], row_name)
            if index is not None:
                file = _write_image(entry[images], into / copy_split, number, row_name, overwrite)
                labelled.append(Row(file, index, split))
        if unlabelled and labelled:
            raise UserError(f"{unlabelled[0]} has no label although other rows have one: get another copy.")
        if unlabelled:
            print(f"{where} has no labels and is skipped.")
        rows += labelled
    finder.check_complete({row.class_index for row in rows}, name)
    return _with_extra_fields(rows, finder.benchmark.key)


def _with_extra_fields(rows: list[Row], key: str) -> list[Row]:
    if key != "imagenet":
        return rows
    return [replace(row, extra_fields=imagenet_fields(row.class_index)) for row in rows]


def _iterate(table: "Dataset", where: str) -> Iterator[dict[str, Any]]:
    """The table's rows. Raises UserError when the file is damaged or truncated."""
    try:
        yield from table
    except Exception as error:  # any type, of the library or of its readers
        raise UserError(f"{where} cannot be read ({reason(error)}): get the copy again.") from None


def _select_columns(
    table: "Dataset", image_column: str | None, label_column: str | None, where: str
) -> tuple["Dataset", str, str]:
    """The table with its images as stored bytes, and the names of its image column and its label column."""
    from datasets import ClassLabel, Image

    features = table.features
    for column, option in ((image_column, "--image-column"), (label_column, "--label-column")):
        if column is not None and column not in features:
            raise UserError(f"{where} has no column {column!r}: {option} must be one of {', '.join(features)}.")
    images = image_column or find_column(features, Image, IMAGE_COLUMNS, "image", where)
    labels = label_column or find_column(features, ClassLabel, LABEL_COLUMNS, "label", where)
    if isinstance(features[images], Image):
        table = table.cast_column(images, Image(decode=False))
    return table, images, labels


def find_column(features: Any, feature_type: type, usual_names: Sequence[str], what: str, where: str) -> str:
    """The only column of a type, else the first one with a usual name. Raises UserError when there is none."""
    typed = [name for name, feature in features.items() if isinstance(feature, feature_type)]
    if len(typed) == 1:
        return typed[0]
    for name in usual_names:
        if name in features:
            return name
    count = f"several {what} columns" if typed else f"no {what} column"
    raise UserError(f"{where} has {count} among {', '.join(features)}: name it with --{what}-column.")


def _index_reader(
    table: "Dataset", column: str, finder: ClassFinder, where: str, class_names: Sequence[str] | None
) -> IndexReader:
    """Return a function from a label, a number or a text, to the class index. Raises UserError for other classes.

    `class_names`: what numbers stand for, where a file beside the table says so.
    """
    from datasets import ClassLabel

    feature = table.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else class_names
    if names is not None:
        indices = finder.find_all(names, f"{where}, column {column}")

        def index_of_number(value: Any, row_name: str) -> int | None:
            value = int(value)  # webdataset may hold it as text
            if not 0 <= value < len(indices):
                raise UserError(
                    f"{row_name} has the label {value}, but its column has {len(indices)} classes: get another copy."
                )
            return indices[value]

        return index_of_number
    known: dict[str, int | None] = {}  # so that each name is searched once

    def index_of_text(value: Any, row_name: str) -> int | None:
        text = str(value)
        if text not in known:
            known[text] = finder.find(text, f"{row_name}, column {column},")
        return known[text]

    return index_of_text


def _write_image(value: Any, folder: Path, number: int, where: str, overwrite: bool) -> Path:
    """Write the image of one row to FOLDER/NUMBER with the suffix of its own format."""
    from PIL import Image, UnidentifiedImageError

    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, str):  # a TSV file holds images in base64
        with contextlib.suppress(ValueError):
            data = base64.b64decode(data, validate=True)
    if data is None and isinstance(value, dict) and value.get("path") and Path(value["path"]).is_file():
        data = Path(value["path"]).read_bytes()
    if not isinstance(data, bytes):
        raise UserError(f"{where} contains no image: check --image-column.")
    try:
        with Image.open(io.BytesIO(data)) as opened:  # reads only the header
            image_format = str(opened.format).lower()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not an image ({error}): get another copy.") from None
    suffix = "jpg" if image_format == "jpeg" else image_format
    file = folder / f"{number:06}.{suffix}"
    if file.exists() and file.read_bytes() == data:
        return file
    if file.exists() and not overwrite:
        raise UserError(
            f"{file} exists and is a different image from {where}, probably of another copy: add --overwrite to "
            "replace those images, or choose another --data-root and --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / ".new"
    new.write_bytes(data)
    os.replace(new, file)
    return file
