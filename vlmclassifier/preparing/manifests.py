"""Splits, counts and files: what the rows of a data set become."""

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

from vlmclassifier.benchmarks import Benchmark, class_index, name_positions, parse_row
from vlmclassifier.preparing.official import Row, imagenet_fields, nested
from vlmclassifier.records import UserError

# Rows of each split by the paper (section 0). ImageNet's train split is not needed by any table of main_results.
PAPER_COUNTS = {
    "imagenet": {"valid": 50_000},
    "flowers": {"train": 2_040, "test": 6_149},
    "cars": {"train": 8_144, "test": 8_041},
    "caltech": {"train": 4_346, "test": 4_331},
}
# SHA-256 of the paper's rows, as rows_digest writes them. Its ImageNet rows are the official validation set.
PAPER_DIGESTS = {
    "flowers": "e153b8207278072ccf6d7d95ebe5ebe31cc42effc5a4021301d90a5682e6da1d",
    "cars": "7f118cdd8ce75a7dec111202930b0cda6317c7a8aaecf14d70c65b3d0300305b",
    "caltech": "f11a0f967bffe3ba329a9b6ea89a327ceee3f385e416de15135d26eff443abb4",
}
NOTE = "not the paper's split"  # tables show it and compare such rows with nothing


def with_splits(rows: Sequence[Row], benchmark: Benchmark, seed: int) -> tuple[list[Row], bool]:
    """The rows with a split that can be evaluated: their own, or where they have none a seeded half of every class.

    The second value says whether halves were drawn.

    ImageNet's pictures without a split are taken for the validation set. The half that a picture falls into depends on
    (seed, class, file name) alone.
    """
    test = benchmark.test_split
    if any(row.split == test for row in rows):
        return list(rows), False
    if benchmark.key == "imagenet":
        return [replace(row, split=test) if row.split == "all" else row for row in rows], False
    by_class: dict[int, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row.class_index, []).append(row)
    train = set()
    for some in by_class.values():
        drawn = sorted(some, key=lambda row: hashlib.sha256(f"{seed}:{_name(row)}".encode()).digest())
        train |= {row.image for row in drawn[: math.ceil(len(some) / 2)]}
    return [replace(row, split="train" if row.image in train else test) for row in rows], True


def _name(row: Row) -> str:
    return f"{row.class_index}:{row.image.parent.name}/{row.image.name}"


def find_paper_manifest(folder: Path, benchmark: Benchmark) -> Path:
    """The paper's manifest in a checkout of its repository, or in a folder with KEY.jsonl or KEY.jsonl.gz.

    Raises UserError where there is none.
    """
    name = f"{benchmark.key}.jsonl"
    places = [place / file for place in (folder, folder / "data") for file in (name, f"{name}.gz")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"--paper-manifests {folder} holds neither {name} nor {name}.gz, nor data/{name}.")
    return file


def paper_rows(
    file: Path, benchmark: Benchmark, names: Sequence[str], places: Sequence[Path], folders: Mapping[str, Path]
) -> list[Row]:
    """The rows of the paper's own manifest, with the pictures in `folders` (by the first part of a path) or `places`.

    Raises UserError for a file that cannot be read or has no rows, and a row of another form or label.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as lines:
            text = lines.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): get it again.") from None
    positions, rows = name_positions(names), []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file} row {number}"
            values = parse_row(line, where)
            if values.get("note"):
                raise UserError(f"{where} says {values['note']!r}: name the folder of the paper's own manifests.")
            parts = [part for part in PurePosixPath(values["image"]).parts if part != "."]
            tail = parts[2:] if parts[:1] == ["data"] else parts  # data/Flowers102/jpg/...
            if not tail:
                raise UserError(f"{where}: the image path {values['image']} names no picture: get the file again.")
            found = class_index(values, positions, where)
            more = imagenet_fields(found) if benchmark.key == "imagenet" else {}
            there = next((place / tail[0] for place in places if (place / tail[0]).is_dir()), places[0] / tail[0])
            image = folders.get(tail[0], there).joinpath(*tail[1:])
            rows.append(Row(nested(image.parent) / image.name, found, values["split"], more))
    if not rows:
        raise UserError(f"{file} has no rows: get it again.")
    return rows


def split_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Rows of each split."""
    return dict(sorted(Counter(row.split for row in rows).items()))


def against_paper(rows: Sequence[Row], benchmark: Benchmark) -> str:
    """How the counts differ from the paper's, in words; "" where they do not."""
    counts, wrong = split_counts(rows), []
    for split, count in PAPER_COUNTS[benchmark.key].items():
        if counts.get(split, 0) != count:
            wrong.append(f"{split} has {counts.get(split, 0):,} rows, the paper's {count:,}")
    return "; ".join(wrong)


def rows_digest(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The SHA-256 of what the rows say in whatever order: each picture's folder and file name, label and split."""
    lines = (f"{row.image.parent.name}/{row.image.name}\t{names[row.class_index]}\t{row.split}\n" for row in rows)
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def compared_with_paper(
    rows: Sequence[Row], benchmark: Benchmark, names: Sequence[str], copied: bool, drawn: bool
) -> tuple[str, str]:
    """The note that the rows carry where they are not the paper's, and a sentence on how they compare.

    `copied`: they are somebody's copy, whose file names say nothing; `drawn`: their split is ours.
    """
    papers = PAPER_DIGESTS.get(benchmark.key)
    if papers and rows_digest(rows, names) == papers:
        return "", "As in the paper: the same pictures with the same labels in the same splits."
    if different := against_paper(rows, benchmark):
        return NOTE, f"Mismatch: {different}."
    if drawn or benchmark.key == "caltech":
        return NOTE, "The paper's split is another one."
    if copied:
        return "", "The counts are the paper's; that this copy has the same pictures in its splits is not checked."
    if papers:
        return NOTE, "Mismatch: the counts are the paper's, but some pictures have another label or split."
    return "", "The counts are the paper's."


def manifest_text(rows: Sequence[Row], names: Sequence[str], data_root: Path, note: str) -> str:
    """The manifest's lines, image paths relative to `data_root`. Raises UserError for a picture outside of it."""
    lines = []
    for row in rows:
        try:
            image = row.image.relative_to(data_root).as_posix()
        except ValueError:
            raise UserError(
                f"{row.image} lies outside of the data root {data_root}: name another --data-root."
            ) from None
        if ".." in PurePosixPath(image).parts:
            raise UserError(f"The image path {image} leaves the data root: get the official annotations.")
        values = {"image": image, "label": names[row.class_index], "split": row.split} | row.more
        lines.append(json.dumps(values | ({"note": note} if note else {}), ensure_ascii=False) + "\n")
    return "".join(lines)


def write_files(texts: dict[Path, str], overwrite: bool) -> None:
    """Write whole files or nothing; one that is the same stays. Raises UserError for one with other content."""
    changed = {file: text for file, text in texts.items() if not file.exists() or file.read_bytes() != text.encode()}
    if not overwrite and (there := next((file for file in changed if file.exists()), None)):
        raise UserError(f"{there} is there with other content: add --overwrite to replace it, or choose another --out.")
    for file, text in changed.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.new")
        new.write_bytes(text.encode())
        os.replace(new, file)
