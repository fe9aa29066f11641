"""Data sets of the user's own: the class names are those of the folders, or of the label column."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.preparing.loading import SPLITS, load_tables
from vlmclassifier.preparing.official import Row, is_visible
from vlmclassifier.records import UserError
from vlmclassifier.scoring.mentions import plain_words

if TYPE_CHECKING:
    from datasets import Dataset

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of a data set, which becomes a file's
MOST = 20_000  # different labels, above which a column holds no classes


def check_name(name: str, known: Sequence[str]) -> None:
    """Raise UserError for a name that cannot be a file's."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a data set: use letters, digits, dots, - and _; or one of "
                        f"{', '.join(known)}.")  # fmt: skip


def names_of_folder(folder: Path) -> list[str]:
    """The class names of FOLDER/CLASS/ or FOLDER/SPLIT/CLASS/, sorted; an underscore is a space. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--folder {folder} is not a folder: give a folder that contains one folder for each class.")
    tops = [entry for entry in folder.iterdir() if entry.is_dir() and is_visible(entry, folder)]
    splits = [entry for entry in tops if entry.name.lower() in SPLITS]
    inner = [entry for top in splits for entry in top.iterdir() if entry.is_dir() and is_visible(entry, top)]
    return different({entry.name for entry in (inner if splits else tops)}, str(folder))


def names_of_dataset(name: str, label_column: str | None) -> list[str]:
    """The class names of a `datasets` copy: of the label column, in its order, else its texts, sorted.

    Raises UserError for numbers without names.
    """
    from datasets import ClassLabel

    from vlmclassifier.preparing.copies import LABEL_COLUMNS, find_column

    tables, beside = load_tables(name)
    found: set[str] = set()
    for split, table in tables.items():
        where = f"{name}, split {split}"
        if label_column is not None and label_column not in table.features:
            raise UserError(f"{where} has no column {label_column!r}: choose one of {', '.join(table.features)}.")
        column = label_column or find_column(table.features, ClassLabel, LABEL_COLUMNS, "label", where)
        feature = table.features[column]
        if isinstance(feature, ClassLabel):
            return [plain(one) for one in feature.names]
        if beside is not None:
            return [plain(one) for one in beside]
        found |= texts_of(table, column, where)
    return different(found, name)


def texts_of(table: "Dataset", column: str, where: str) -> set[str]:
    """The different texts of a column. Raises UserError for numbers, and for more than a list of classes can have."""
    found = set()
    for row in table.select_columns([column]):
        value = row[column]
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{where}, column {column}, holds numbers without names: give another --label-column.")
        found.add(value)
        if len(found) > MOST:
            raise UserError(f"{where}, column {column}, has more than {MOST:,} different texts: these are no classes.")
    return found


def plain(name: str) -> str:
    """A folder's or a column's name as a class name."""
    return " ".join(name.replace("_", " ").split())


def different(names: set[str], where: str) -> list[str]:
    """Class names, sorted. Raises UserError for fewer than two, and for two that are the same in words."""
    if len(names) < 2:
        raise UserError(f"{where} has {len(names)} class folders or names: at least two are needed.")
    of_words: dict[str, str] = {}
    for name in sorted(names):
        other = of_words.setdefault(plain_words(plain(name)), name)
        if other != name:
            raise UserError(f"{where} has the classes {other!r} and {name!r}, which are the same in words: merge or "
                            "rename them.")  # fmt: skip
    return [plain(name) for name in sorted(names)]


def test_split_of(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Rows whose validation images are the test split where there is no other; and a sentence, "" for none."""
    splits = {row.split for row in rows}
    if "test" in splits or "valid" not in splits:
        return list(rows), ""
    moved: list[Any] = [replace(row, split="test") if row.split == "valid" else row for row in rows]
    return moved, "There is no test split: the validation images are the test split."
