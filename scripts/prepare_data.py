"""Write a benchmark's manifest and class list from its official archives, from a copy, or from a folder of pictures.

    python scripts/prepare_data.py flowers
    python scripts/prepare_data.py cars --archives DIR              # its address is dead: DIR holds the files
    python scripts/prepare_data.py caltech --paper-manifests DIR    # the paper's split: a checkout of its repository
    python scripts/prepare_data.py imagenet --archives DIR
    python scripts/prepare_data.py cars --dataset OWNER/NAME        # on the hub, or a local folder of parquet files
    python scripts/prepare_data.py caltech --folder DIR             # DIR/CLASS/*.jpg or DIR/SPLIT/CLASS/*.jpg

Writes data/BENCHMARK.jsonl and data/BENCHMARK_classes.json. Archives are downloaded where they may be (a broken
download goes on where it broke off), checked and unpacked; files that lie there as torchvision's classes expect them
are used as they are. The counts are compared with the paper's; rows of another split say so, and so will every table.
data/README.md names the sources and their traps.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, Benchmark, class_names
from vlmclassifier.paths import PROJECT_ROOT, local_path
from vlmclassifier.preparing.archives import Absent
from vlmclassifier.preparing.copies import read_dataset, read_folder
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.preparing.manifests import (
    NOTE,
    against_paper,
    find_paper_manifest,
    manifest_text,
    paper_rows,
    split_counts,
    with_splits,
    write_files,
)
from vlmclassifier.preparing.official import PICTURE_FOLDERS, READERS, Place, Row
from vlmclassifier.records import UserError

SAID = {
    "official": "As in the paper.",
    "copy": "The counts are the paper's; that this copy has the same pictures in its splits is not checked.",
}


@dataclass
class Args:
    benchmark: tyro.conf.Positional[Literal["imagenet", "flowers", "cars", "caltech"]]
    """Which one."""
    archives: Path | None = None
    """Folder of the official files, packed or unpacked, and for what is downloaded; without it data/TITLE here, such as
    data/Flowers102, where the paper's code has them."""
    dataset: str | None = None
    """In place of the archives: a Hugging Face datasets repository, or a folder or file of parquet."""
    folder: Path | None = None
    """In place of the archives: a folder with a folder of pictures for each class, or such folders for each split."""
    paper_manifests: Path | None = None
    """A checkout of the paper's repository, or a folder with its BENCHMARK.jsonl or .jsonl.gz: its rows are used."""
    out: Path = PROJECT_ROOT / "data"
    """Folder of the manifest and the class list."""
    data_root: Path | None = None
    """Folder that the manifest's image paths start from; without it that of paths.toml, else this project, else the
    pictures' own folder. The pictures of --dataset are written below it."""
    image_column: str | None = None
    """With --dataset: the column of pictures, where it is not plain which one."""
    label_column: str | None = None
    """With --dataset: the column of classes."""
    download: bool = True
    """Download official files that are not there; --no-download: use what is on the disk."""
    any_checksum: bool = False
    """Take official files whose checksum is another, such as a mirror's that were packed again."""
    overwrite: bool = False
    """Replace a manifest or class list that is there with other content."""
    seed: int = 0
    """Seed of the half of each class that becomes the train split, where a data set has no split."""


def main(args: Args) -> None:
    """Read the rows, compare them with the paper's, write them."""
    benchmark = BENCHMARKS[args.benchmark]
    names = class_names(benchmark)
    found, source = read(args, benchmark, ClassFinder(benchmark, names))
    rows = with_splits(found, benchmark, args.seed)
    different = against_paper(rows, benchmark)
    note = NOTE if different or source == "halves" else ""
    root = data_root(args, rows)
    manifest, classes = args.out / f"{benchmark.key}.jsonl", args.out / f"{benchmark.key}_classes.json"
    texts = {classes: json.dumps(list(names), ensure_ascii=False, indent=2) + "\n",
             manifest: manifest_text(rows, names, root, note)}  # fmt: skip
    write_files(texts, args.overwrite)
    counts = ", ".join(f"{split} {count:,}" for split, count in split_counts(rows).items())
    print(f"{benchmark.title}: {len(rows):,} rows ({counts}) of {len(set(names))} class names")
    if [row.split for row in found] != [row.split for row in rows]:
        print(f"No row had the split {benchmark.test_split!r}: the splits above are ours (--seed {args.seed}).")
    if different:
        print(f"Mismatch: {different}.")
    print(f"Every table will say {note!r} of these rows and compare them with nothing." if note else SAID[source])
    if missing := [row.image for row in rows if not row.image.is_file()]:
        print(
            f"{len(missing):,} of the {len(rows):,} pictures are not there yet, the first {missing[0]}: put them there."
        )
    print(f"Written: {manifest}, {classes}")
    flags = "" if root == usual_root(benchmark.key) else f" --data-root {root}"
    if args.out.resolve() not in (root.resolve(), PROJECT_ROOT / "data"):
        print(f"Put the manifest into {root} or {PROJECT_ROOT / 'data'}, where the scripts look for it.")
    print(f"Next: python main_results/classify_clip.py --model clip-vit-l-336 --benchmark {benchmark.key}{flags}")


def read(args: Args, benchmark: Benchmark, finder: ClassFinder) -> tuple[list[Row], str]:
    """The rows of the source that was named, and how sure it is that they are the paper's: a key of SAID, or halves."""
    if sum(source is not None for source in (args.archives, args.dataset, args.folder)) > 1:
        raise UserError("--archives, --dataset and --folder are three sources: name one of them.")
    home = home_of(args, benchmark)
    place = Place(home, args.download, args.any_checksum)
    if args.paper_manifests:
        if args.dataset:
            raise UserError("--paper-manifests goes with the official pictures (--archives) or --folder.")
        file = find_paper_manifest(args.paper_manifests, benchmark)
        pictures = whole(args.folder) if args.folder else pictures_of(benchmark, place)
        return paper_rows(file, benchmark, finder.names, pictures), "official"
    if args.dataset:
        into = whole(args.data_root) / benchmark.title if args.data_root else home
        rows = read_dataset(args.dataset, into, finder, args.image_column, args.label_column)
    elif args.folder:
        rows = read_folder(whole(args.folder), finder)
    else:
        rows = READERS[benchmark.key](place, finder)
    if benchmark.key == "caltech":  # which has no public split
        return rows, "halves"
    return rows, "copy" if args.dataset or args.folder else "official"


def pictures_of(benchmark: Benchmark, place: Place) -> Path:
    """Where the paper's paths start: the official pictures, unpacked, or where they are to be put."""
    try:
        return PICTURE_FOLDERS[benchmark.key](place) if benchmark.key in PICTURE_FOLDERS else place.folder
    except Absent as absent:
        print(f"Note: {absent}")
        return place.folder


def data_root(args: Args, rows: list[Row]) -> Path:
    """Where the image paths start."""
    if args.data_root:
        return whole(args.data_root)
    first = rows[0].image
    for root in (usual_root(args.benchmark), PROJECT_ROOT):
        if first.is_relative_to(root) and first.resolve().is_relative_to(root.resolve()):
            return root  # a link that leads out of it would be refused when the picture is opened
    return home_of(args, BENCHMARKS[args.benchmark])


def home_of(args: Args, benchmark: Benchmark) -> Path:
    """Where the pictures lie or will lie."""
    return whole(args.folder or args.archives or PROJECT_ROOT / "data" / benchmark.title)


def usual_root(key: str) -> Path:
    """Where the scripts look without --data-root: the benchmark's line in paths.toml, else this project."""
    return whole(local_path("benchmarks", key) or PROJECT_ROOT)


def whole(path: Path) -> Path:
    """The absolute path without ".."; links stay, so that data/Flowers102 may be one to another disk."""
    return Path(os.path.abspath(path))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
