"""Other people's copies: a Hugging Face `datasets` repository, parquet files, or a folder of pictures by class."""

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.preparing.official import Row, class_folders, imagenet_fields, is_wanted
from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test",
          "val": "valid", "valid": "valid", "validation": "valid"}  # fmt: skip
LABELS = ("label", "labels", "class", "class_name", "fine_label", "target")
IMAGES = ("image", "img", "picture", "jpg")


def split_name(theirs: str, key: str) -> str:
    """The split of a manifest for a split of a copy; Flowers' validation set belongs to the train split."""
    split = SPLITS.get(theirs.lower(), "")
    return "train" if key == "flowers" and split == "valid" else split


def read_folder(folder: Path, finder: ClassFinder) -> list[Row]:
    """The pictures of FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/, by split, class folder and file name.

    Raises UserError where there is no class folder, or not every class.
    """
    if not folder.is_dir():
        raise UserError(f"--folder {folder} is not a folder: name the one that holds a folder for each class.")
    key = finder.benchmark.key
    inner = sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_wanted(entry, folder))
    splits = [entry for entry in inner if split_name(entry.name, key)]
    if splits and len(splits) < len(inner):
        other = next(entry.name for entry in inner if entry not in splits)
        raise UserError(f"{folder} holds splits ({splits[0].name}) beside {other}: name a folder with one of the two.")
    rows = [row for entry in splits for row in class_folders(entry, finder, split_name(entry.name, key))]
    rows = rows if splits else class_folders(folder, finder, "all")
    finder.check_complete({row.class_index for row in rows}, str(folder))
    return [_with_fields(row, key) for row in rows]


def read_dataset(
    name: str, into: Path, finder: ClassFinder, image_column: str | None, label_column: str | None, overwrite: bool
) -> list[Row]:
    """The pictures of a `datasets` repository, or of a local folder or file of parquet, written as files below `into`.

    The pictures' own bytes are written; those that are there already are not written again. A split without labels, as
    the hub has ImageNet's test set, is left out. Raises UserError for a copy that cannot be loaded, has not the columns
    or has other classes, and for another picture that is there and not to be overwritten.
    """
    from tqdm import tqdm

    rows = []
    for theirs, table in sorted(_load(name).items()):
        where = f"{name}, split {theirs}"
        split = split_name(theirs, finder.benchmark.key) or "all"
        table, images, labels, index_of = _columns(table, finder, image_column, label_column, where)
        bar = tqdm(_entries(table, where), desc=f"Writing pictures of {theirs}", unit="pic", disable=None)
        found, without = [], []
        for number, entry in enumerate(bar):
            if entry[labels] in (None, -1):  # what `datasets` has for no label
                without.append(number)
                continue
            index = index_of(entry[labels], f"{where} row {number}")
            if index is not None:
                file = _write(entry[images], into / theirs, number, f"{where} row {number}", overwrite)
                found.append(Row(file, index, split))
        if without and found:
            raise UserError(f"{where} row {without[0]} has no label, other rows have: get another copy.")
        if without:
            print(f"{where} has no labels and is left out.")
        rows += found
    finder.check_complete({row.class_index for row in rows}, name)
    return [_with_fields(row, finder.benchmark.key) for row in rows]


def _with_fields(row: Row, key: str) -> Row:
    return Row(row.image, row.class_index, row.split, imagenet_fields(row.class_index) if key == "imagenet" else {})


def _load(name: str) -> "DatasetDict":
    from datasets import load_dataset

    path, splits = Path(name), {}
    for file in [path] if path.is_file() else sorted(f for f in path.rglob("*.parquet") if is_wanted(f, path)):
        _check_parquet(file)
        words = [file.stem.split("-")[0], file.parent.name]  # train-00000-of-00002.parquet, or a folder per split
        splits.setdefault(next((word for word in words if word.lower() in SPLITS), "all"), []).append(str(file))
    if path.is_dir() and not splits:
        raise UserError(f"--dataset {name} holds no parquet file: name a folder that does, or a hub repository.")
    try:
        if splits:  # streamed: a copy in the library's cache would take the same space again
            return load_dataset("parquet", data_files=splits, streaming=True)
        return load_dataset(name)
    except Exception as error:  # the library raises many kinds: no network, no such repository, gated, a broken file
        raise UserError(
            f"--dataset {name} cannot be loaded ({_reason(error)}): mend the name, or name the folder of a local copy "
            "of its parquet files."
        ) from None


def _check_parquet(file: Path) -> None:
    """Raise UserError for a file that is none, which `datasets` would not name."""
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be loaded ({_reason(error)}): get it again, or remove it.") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"


def _entries(table: "Dataset", where: str) -> Iterator[dict[str, Any]]:
    """The table's rows. Raises UserError where its file breaks off."""
    try:
        yield from table
    except Exception as error:  # of the library, of its readers
        raise UserError(f"{where} cannot be read ({_reason(error)}): get the copy again.") from None


def _columns(table: "Dataset", finder: ClassFinder, image: str | None, label: str | None, where: str) -> tuple:
    """The table with its pictures as stored, the names of the two columns, and what makes a label a class index."""
    from datasets import ClassLabel, Image

    features = table.features
    for column, option in ((image, "--image-column"), (label, "--label-column")):
        if column is not None and column not in features:
            raise UserError(f"{where} has no column {column!r}: {option} must be one of {', '.join(features)}.")
    image = image or _the_column(features, Image, IMAGES, "image", where)
    label = label or _the_column(features, ClassLabel, LABELS, "label", where)
    if isinstance(features[image], Image):
        table = table.cast_column(image, Image(decode=False))  # bytes, as they are stored
    if isinstance(features[label], ClassLabel):
        indices = finder.find_all(features[label].names, f"{where}, column {label}")

        def index_of(value: Any, row: str) -> int | None:
            if not 0 <= value < len(indices):
                raise UserError(f"{row} has the label {value}, its column {len(indices)} classes: get another copy.")
            return indices[value]

        return table, image, label, index_of
    known: dict[str, int | None] = {}

    def index_of_text(value: Any, row: str) -> int | None:
        text = str(value)
        if text not in known:
            known[text] = finder.find(text, f"{row}, column {label},")
        return known[text]

    return table, image, label, index_of_text


def _the_column(features: Any, kind: type, usual: Sequence[str], what: str, where: str) -> str:
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    named = [name for name in usual if name in features]
    for found in (typed, named):
        if len(found) == 1 or (found and found is named):
            return found[0]
    how_many = f"several {what} columns" if typed else f"no {what} column"
    raise UserError(f"{where} has {how_many} among {', '.join(features)}: name it with --{what}-column.")


def _write(value: Any, folder: Path, number: int, where: str, overwrite: bool) -> Path:
    """The picture of one row as a file of its own format."""
    from PIL import Image, UnidentifiedImageError

    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None and isinstance(value, dict) and value.get("path") and Path(value["path"]).is_file():
        data = Path(value["path"]).read_bytes()
    if not isinstance(data, bytes):
        raise UserError(f"{where} holds no picture: is --image-column right?")
    try:
        with Image.open(io.BytesIO(data)) as opened:  # only the header is read
            suffix = {"JPEG": ".jpg"}.get(str(opened.format), f".{str(opened.format).lower()}")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not a picture ({error}): get another copy.") from None
    file = folder / f"{number:06}{suffix}"
    if file.exists() and file.read_bytes() == data:
        return file
    if file.exists() and not overwrite:
        raise UserError(
            f"{file} is there and is another picture than {where}, of another copy: add --overwrite to replace those "
            "pictures, or choose another --data-root and --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / ".new"
    new.write_bytes(data)
    os.replace(new, file)
    return file
