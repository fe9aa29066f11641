"""Write a benchmark's manifest and class list from its official archives, from a copy, or from a folder of pictures.

    python scripts/prepare_data.py flowers
    python scripts/prepare_data.py cars --archives DIR              # its address is dead: DIR holds the files
    python scripts/prepare_data.py caltech --paper-manifests DIR    # the paper's split: a checkout of its repository
    python scripts/prepare_data.py imagenet --archives DIR
    python scripts/prepare_data.py cars --dataset OWNER/NAME        # on the hub, or a local folder of parquet files
    python scripts/prepare_data.py caltech --folder DIR             # DIR/CLASS/*.jpg or DIR/SPLIT/CLASS/*.jpg

Writes data/BENCHMARK.jsonl and data/BENCHMARK_classes.json. Archives are downloaded where they may be (a broken
download goes on where it broke off), checked and unpacked; files that lie there as torchvision's classes expect them
are used as they are. The rows are compared with the paper's; those of another split say so, and so will every table.
data/README.md names the sources and their traps.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, Benchmark, class_names, find_manifest
from vlmclassifier.paths import PROJECT_ROOT, local_path
from vlmclassifier.preparing.copies import read_dataset, read_folder
from vlmclassifier.preparing.downloads import Absent
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.preparing.manifests import (
    compared_with_paper,
    find_paper_manifest,
    manifest_text,
    paper_rows,
    split_counts,
    with_splits,
    write_files,
)
from vlmclassifier.preparing.official import PICTURE_FOLDERS, READERS, Place, Row
from vlmclassifier.records import UserError


@dataclass
class Args:
    benchmark: tyro.conf.Positional[Literal["imagenet", "flowers", "cars", "caltech"]]
    """Which one."""
    archives: Path | None = None
    """Folder of the official files, packed or unpacked, and for what is downloaded; without it data/TITLE here, such as
    data/Flowers102, where the paper's code has them."""
    unpack_into: Path | None = None
    """With --archives: another folder to unpack and download into, where that one cannot be written to."""
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
    """Replace a manifest, class list or picture of --dataset that is there with other content."""
    seed: int = 0
    """Seed of the half of each class that becomes the train split, where a data set has no split."""


def main(args: Args) -> None:
    """Read the rows, compare them with the paper's, write them."""
    benchmark = BENCHMARKS[args.benchmark]
    names = class_names(benchmark)
    found, copied = read(args, benchmark, ClassFinder(benchmark, names))
    rows, drawn = with_splits(found, benchmark, args.seed)
    note, said = compared_with_paper(rows, benchmark, names, copied, drawn)
    root = data_root(args, rows)
    manifest, classes = args.out / f"{benchmark.key}.jsonl", args.out / f"{benchmark.key}_classes.json"
    texts = {classes: json.dumps(list(names), ensure_ascii=False, indent=2) + "\n",
             manifest: manifest_text(rows, names, root, note)}  # fmt: skip
    write_files(texts, args.overwrite)
    counts = ", ".join(f"{split} {count:,}" for split, count in split_counts(rows).items())
    print(f"{benchmark.title}: {len(rows):,} rows ({counts}) of {len(set(names))} class names")
    if drawn:
        print(f"No row had the split {benchmark.test_split!r}: the splits above are ours (--seed {args.seed}).")
    print(said)
    if note:
        print(f"Every table will say {note!r} of these rows and compare them with nothing.")
    if missing := [row.image for row in rows if not row.image.is_file()]:
        print(f"{len(missing):,} of the {len(rows):,} pictures are not there yet, the first {missing[0]}: put them "
              "there, or remove the folder that is only half unpacked and run again.")  # fmt: skip
    print(f"Written: {manifest}, {classes}")
    warn_of_another(manifest, benchmark, root)
    flags = "" if root == usual_root(benchmark.key) else f" --data-root {root}"
    print(f"Next: python main_results/classify_clip.py --model clip-vit-l-336 --benchmark {benchmark.key}{flags}")


def warn_of_another(manifest: Path, benchmark: Benchmark, root: Path) -> None:
    """Say where the scripts look, should it not be where the manifest is."""
    places = f"{root} or {PROJECT_ROOT / 'data'}"
    try:
        found = find_manifest(benchmark, root)
    except UserError:
        print(f"Put the manifest into {places}, where the scripts look for it.")
    else:
        if not found.samefile(manifest):
            print(
                f"Note: the scripts will read {found}, which is another manifest: remove it or replace it by this one."
            )


def read(args: Args, benchmark: Benchmark, finder: ClassFinder) -> tuple[list[Row], bool]:
    """The rows of the source that was named, and whether that is somebody's copy."""
    if sum(source is not None for source in (args.archives, args.dataset, args.folder)) > 1:
        raise UserError("--archives, --dataset and --folder are three sources: name one of them.")
    if args.unpack_into and (args.dataset or args.folder):
        raise UserError("--unpack-into goes with the official archives (--archives).")
    if args.archives and args.archives.is_file():
        raise UserError(f"--archives {args.archives} is a file: name the folder that holds it.")
    home = home_of(args, benchmark)
    packed = whole(args.archives) if args.archives else None
    place = Place(home, args.download, args.any_checksum, packed).of(benchmark.key)
    if args.paper_manifests:
        if args.dataset:
            raise UserError("--paper-manifests goes with the official pictures (--archives) or --folder.")
        file = find_paper_manifest(args.paper_manifests, benchmark)
        folders = {} if args.folder else pictures_of(benchmark, place)
        return paper_rows(file, benchmark, finder.names, place.folders, folders), False
    if args.dataset:
        into = whole(args.data_root) / benchmark.title if args.data_root else home
        columns = args.image_column, args.label_column
        return read_dataset(args.dataset, into, finder, *columns, args.overwrite), True
    if args.folder:
        return read_folder(whole(args.folder), finder), True
    return READERS[benchmark.key](place, finder), False


def pictures_of(benchmark: Benchmark, place: Place) -> dict[str, Path]:
    """The folders of the official pictures, unpacked; none where they are still to be put."""
    try:
        return PICTURE_FOLDERS[benchmark.key](place) if benchmark.key in PICTURE_FOLDERS else {}
    except Absent as absent:
        print(f"Note: {absent}")
        return {}


def data_root(args: Args, rows: list[Row]) -> Path:
    """Where the image paths start."""
    if args.data_root:
        return whole(args.data_root)
    first, home = rows[0].image, home_of(args, BENCHMARKS[args.benchmark])
    packed = [whole(args.archives)] if args.archives else []
    for root in (usual_root(args.benchmark), PROJECT_ROOT, home, *packed):
        if first.is_relative_to(root) and first.resolve().is_relative_to(root.resolve()):
            return root  # a link that leads out of it would be refused when the picture is opened
    return home


def home_of(args: Args, benchmark: Benchmark) -> Path:
    """Where the pictures lie or will lie."""
    return whole(args.folder or args.unpack_into or args.archives or PROJECT_ROOT / "data" / benchmark.title)


def usual_root(key: str) -> Path:
    """Where the scripts look without --data-root: the benchmark's line in paths.toml, else this project."""
    return whole(local_path("benchmarks", key) or PROJECT_ROOT)


def whole(path: Path) -> Path:
    """The absolute path without ".."; links stay, so that data/Flowers102 may be one to another disk."""
    return Path(os.path.abspath(path))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
