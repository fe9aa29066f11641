"""Splits, the comparison with the paper's rows, and the manifest file."""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vlmclassifier.benchmarks import Benchmark, class_index, parse_row
from vlmclassifier.class_lists import name_positions
from vlmclassifier.preparing.official import Row, imagenet_fields, subfolder_or_self
from vlmclassifier.records import UserError

NOTE = "not the paper's split"  # a tag of every run on such rows; tables do not compare them with the paper


def assign_splits(rows: Sequence[Row], benchmark: Benchmark, seed: int) -> tuple[list[Row], bool]:
    """Return the rows with a test split: their own, or a seeded half of every class if they have none.

    ImageNet's images without a split become the validation set. Which half an image is in depends only on the seed, its
    class and its file name. The second value tells whether halves were drawn.
    """
    test = benchmark.test_split
    if any(row.split == test for row in rows):
        return list(rows), False
    if benchmark.key == "imagenet":
        return [replace(row, split=test) if row.split == "all" else row for row in rows], False
    by_class: dict[int, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row.class_index, []).append(row)
    train: set[Path] = set()
    for class_rows in by_class.values():
        drawn = sorted(class_rows, key=lambda row: _draw_key(row, seed))
        for row in drawn[: math.ceil(len(drawn) / 2)]:
            train.add(row.image)
    return [replace(row, split="train" if row.image in train else test) for row in rows], True


def _draw_key(row: Row, seed: int) -> bytes:
    """A pseudo-random sort key that does not depend on the other rows."""
    name = f"{row.class_index}:{row.image.parent.name}/{row.image.name}"
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def find_paper_manifest(folder: Path, benchmark: Benchmark) -> Path:
    """Return the paper's KEY.jsonl or KEY.jsonl.gz in `folder` or, as in a checkout of its repository, in its data/.

    Raises UserError when there is none.
    """
    name = f"{benchmark.key}.jsonl"
    candidates = [name, f"{name}.gz", f"data/{name}", f"data/{name}.gz"]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"--paper-manifests {folder} contains none of {', '.join(candidates)}: give a checkout of the paper's "
        "repository."
    )


def read_paper_rows(
    file: Path,
    benchmark: Benchmark,
    names: Sequence[str],
    search_folders: Sequence[Path],
    image_folders: Mapping[str, Path],
) -> list[Row]:
    """Return the rows of the paper's own manifest with the image files on this machine.

    `image_folders`: the known image folders, by their names in the paper's paths (such as jpg). `search_folders`: where
    any other image folder is looked for.

    Raises UserError for a file that cannot be read or has no rows, and for a row with a wrong form or label.
    """
    positions = name_positions(names)
    rows = []
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file} row {number}"
        values = parse_row(line, where)
        if values.get("note"):
            raise UserError(f"{where} has the note {values['note']!r}: give the folder of the paper's own manifests.")
        image = _image_file(values["image"], search_folders, image_folders, where)
        index = class_index(values, positions, where)
        extra_fields = imagenet_fields(index) if benchmark.key == "imagenet" else {}
        rows.append(Row(image, index, values["split"], extra_fields))
    if not rows:
        raise UserError(f"{file} has no rows: get it again.")
    return rows


def _read_text(file: Path) -> str:
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rt", encoding="utf-8-sig") as stream:
                return stream.read()
        with open(file, encoding="utf-8-sig") as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): get it again.") from None


def _image_file(path: str, search_folders: Sequence[Path], image_folders: Mapping[str, Path], where: str) -> Path:
    """The file of an image path of the paper, such as ./data/Flowers102/jpg/image_00001.jpg."""
    parts = PurePosixPath(path).parts
    if parts[:1] == ("data",):
        parts = parts[2:]
    if not parts:
        raise UserError(f"{where}: the image path {path} has no file name: get the file again.")
    top = parts[0]
    folder = image_folders.get(top)
    if folder is None:
        folder = next((search / top for search in search_folders if (search / top).is_dir()), search_folders[0] / top)
    image = folder.joinpath(*parts[1:])
    return subfolder_or_self(image.parent, image.parent.name) / image.name


def split_counts(rows: Sequence[Row]) -> dict[str, int]:
    """The number of rows of each split."""
    return dict(sorted(Counter(row.split for row in rows).items()))


def count_differences(rows: Sequence[Row], benchmark: Benchmark) -> str:
    """How the number of rows of each split differs from the paper's, in words; "" if it does not."""
    counts = split_counts(rows)
    differences = []
    for split, paper_count in benchmark.paper_rows.items():
        count = counts.get(split, 0)
        if count != paper_count:
            differences.append(f"{split} has {count:,} rows, the paper's {paper_count:,}")
    return "; ".join(differences)


def rows_digest(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The SHA-256 of the rows in any order: the folder name and file name, label and split of each image."""
    lines = []
    for row in rows:
        lines.append(f"{row.image.parent.name}/{row.image.name}\t{names[row.class_index]}\t{row.split}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def compare_with_paper(
    rows: Sequence[Row], benchmark: Benchmark, names: Sequence[str], is_copy: bool, drawn: bool
) -> tuple[str, str]:
    """Return the note for rows that are not the paper's ("" for the paper's), and a sentence on the comparison.

    `is_copy`: the rows are from a third-party copy, whose file names do not identify the images. `drawn`: the splits
    were drawn here.
    """
    paper_digest = benchmark.paper_rows_sha256
    if paper_digest and rows_digest(rows, names) == paper_digest:
        return "", "As in the paper: the same images with the same labels in the same splits."
    if differences := count_differences(rows, benchmark):
        return NOTE, f"Mismatch: {differences}."
    if drawn or benchmark.key == "caltech":
        return NOTE, "Mismatch: the counts are the paper's, but the splits are not."
    if is_copy:
        return "", "The counts are the paper's; whether this copy has the same images in each split is not checked."
    if paper_digest:
        return NOTE, "Mismatch: the counts are the paper's, but some images have a different label or split."
    return "", "The counts are the paper's."


def manifest_text(rows: Sequence[Row], names: Sequence[str], data_root: Path, note: str) -> str:
    """The manifest's lines, with image paths relative to `data_root`.

    Raises UserError for an image outside `data_root`.
    """
    lines = []
    for row in rows:
        try:
            image = row.image.relative_to(data_root).as_posix()
        except ValueError:
            raise UserError(f"{row.image} is outside the data root {data_root}: give another --data-root.") from None
        if ".." in PurePosixPath(image).parts:
            raise UserError(f"The image path {image} leaves the data root: get the official annotations.")
        values = {"image": image, "label": names[row.class_index], "split": row.split} | row.extra_fields
        if note:
            values["note"] = note
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_files(texts: Mapping[Path, str], overwrite: bool) -> None:
    """Write all files or none; a file that has the same content already is not touched.

    Raises UserError for an existing file with different content, unless `overwrite` is set.
    """
    changed = {}
    for file, text in texts.items():
        if not file.exists():
            changed[file] = text
        elif file.read_bytes() != text.encode():
            if not overwrite:
                raise UserError(
                    f"{file} exists with different content: add --overwrite to replace it, or choose another --out."
                )
            changed[file] = text
    for file, text in changed.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.new")
        new.write_bytes(text.encode())
        os.replace(new, file)
