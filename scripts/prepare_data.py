"""Write a manifest and class list: of a benchmark from its official archives or a copy, or of your own images.

    python scripts/prepare_data.py flowers
    python scripts/prepare_data.py cars --archives DIR              # its official address is dead: DIR has the files
    python scripts/prepare_data.py caltech --paper-manifests DIR    # the paper's split: a checkout of its repository
    python scripts/prepare_data.py imagenet --archives DIR          # the official files, or Kaggle's download, unpacked
    python scripts/prepare_data.py cars --dataset OWNER/NAME        # on the hub, or a local folder of parquet files
    python scripts/prepare_data.py caltech --folder DIR             # DIR/CLASS/*.jpg or DIR/SPLIT/CLASS/*.jpg
    python scripts/prepare_data.py birds --folder DIR               # your own classes: any name, DIR as above
    python scripts/prepare_data.py birds --dataset OWNER/NAME       # the same from the hub or parquet files
    python scripts/prepare_data.py llava-texts                      # checks the training texts that paths.toml names

Writes data/BENCHMARK.jsonl and data/BENCHMARK_classes.json. Of your own data the classes are the names of the folders
or of the label column; where there is no test split, half of each class is drawn as the train split. Archives are
downloaded where that is possible (an interrupted download is resumed), checked and unpacked; files that are unpacked
already, as torchvision's classes expect them, are used as they are. The rows are compared with the paper's; rows of
another split get a note, which every table shows. data/README.md lists the sources and their known problems.
"""

import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import tyro

from vlmclassifier import cli
from vlmclassifier.benchmarks import BENCHMARKS, Benchmark, class_names, find_manifest
from vlmclassifier.class_lists import JsonList
from vlmclassifier.images import check_location, image_size
from vlmclassifier.paths import PROJECT_ROOT, local_path
from vlmclassifier.preparing.copies import read_dataset, read_folder
from vlmclassifier.preparing.downloads import MissingFileError
from vlmclassifier.preparing.labels import ClassFinder
from vlmclassifier.preparing.manifests import (
    assign_splits,
    compare_with_paper,
    find_paper_manifest,
    manifest_text,
    read_paper_rows,
    split_counts,
    write_files,
)
from vlmclassifier.preparing.official import IMAGE_FOLDERS, READERS, Row, Source
from vlmclassifier.preparing.own import check_name, names_of_dataset, names_of_folder, test_split_of
from vlmclassifier.preparing.texts import check_texts
from vlmclassifier.records import UserError

LLAVA_TEXTS = "llava-texts"


@dataclass
class Args:
    benchmark: tyro.conf.Positional[str]
    """The benchmark to prepare (imagenet, flowers, cars, caltech), or a name for your own data with --folder or
    --dataset; llava-texts checks LLaVA's training texts in paths.toml, [texts]."""
    archives: Path | None = None
    """Folder of the official files, packed or unpacked; downloads are written there too. If not given: data/TITLE in
    this project, such as data/Flowers102, as in the paper's code."""
    unpack_into: Path | None = None
    """With --archives: another folder to unpack and download into, for a folder that cannot be written to."""
    dataset: str | None = None
    """Instead of the archives: a Hugging Face datasets repository, or a local copy: a folder or file of parquet,
    webdataset (*.tar) or TSV with base64 images, or a folder of datasets.save_to_disk."""
    folder: Path | None = None
    """Instead of the archives: a folder with one folder of images per class, or with such folders in one per split."""
    paper_manifests: Path | None = None
    """A checkout of the paper's repository, or a folder with its BENCHMARK.jsonl or .jsonl.gz: its rows are used."""
    out: Path | None = None
    """Folder of the manifest and the class list; default: data in this project, for your own --folder that folder."""
    data_root: Path | None = None
    """Folder that the manifest's image paths are relative to. If not given: the benchmark's folder in paths.toml, else
    this project, else the folder of the images; of your own data the folder of the manifest, else of the images. The
    images of --dataset are written below it."""
    image_column: str | None = None
    """With --dataset: name of the image column, if it is ambiguous."""
    label_column: str | None = None
    """With --dataset: name of the class column, if it is ambiguous."""
    download: bool = True
    """Download missing official files; --no-download uses only the files on the disk."""
    any_checksum: bool = False
    """Accept official files with a different checksum, such as those of a mirror that packed them again."""
    overwrite: bool = False
    """Replace an existing manifest, class list or image of --dataset that has different content."""
    seed: int = 0
    """Seed of the half of each class that becomes the train split, if the data set has no split."""


def main(args: Args) -> None:
    """Read the rows, compare them with the paper's and write them."""
    if args.benchmark == LLAVA_TEXTS:
        print("\n".join(check_texts()) + "\nNext: bash data_analysis/count.sh")
        return
    is_own = args.benchmark not in READERS
    out = args.out or (args.folder if is_own and args.folder else PROJECT_ROOT / "data")
    manifest, class_list = out / f"{args.benchmark}.jsonl", out / f"{args.benchmark}_classes.json"
    if is_own:
        benchmark, names = own_benchmark(args, class_list)
    else:
        benchmark = BENCHMARKS[args.benchmark]
        names = class_names(benchmark)
    found, is_copy = read_rows(args, benchmark, ClassFinder(benchmark, names))
    found, moved = test_split_of(found) if is_own else (found, "")
    rows, drawn = assign_splits(found, benchmark, args.seed)
    if is_own:
        note, comparison = "", moved or "Your own data: nothing to compare with."
    else:
        note, comparison = compare_with_paper(rows, benchmark, names, is_copy, drawn)
    root = data_root(args, benchmark, rows, out)
    texts = {
        class_list: json.dumps(list(names), ensure_ascii=False, indent=2) + "\n",
        manifest: manifest_text(rows, names, root, note),
    }
    for row in rows:  # what the scripts would refuse to open must not be in a manifest
        check_location(row.image, root, str(row.image))
    write_files(texts, args.overwrite)
    counts = ", ".join(f"{split} {count:,}" for split, count in split_counts(rows).items())
    print(f"{benchmark.title}: {len(rows):,} rows ({counts}) of {len(set(names))} class names")
    if drawn:
        print(
            f"No row had the split {benchmark.test_split!r}: half of each class was drawn as the train split "
            f"(--seed {args.seed})."
        )
    print(comparison)
    if note:
        print(f"Every table tags runs on these rows with {note!r} and does not compare them with the paper.")
    missing = [row.image for row in rows if not row.image.is_file()]
    if missing:
        print(
            f"{len(missing):,} of the {len(rows):,} images do not exist yet, the first is {missing[0]}: put them "
            "there, or remove an incompletely unpacked folder and run again."
        )
    print(f"Written: {manifest}, {class_list}")
    flags = "" if root == default_root(benchmark.key) else f" --data-root {root}"
    selected = benchmark.key
    if is_own:
        print(f"Classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}. To rename one, rename its folder "
              "and run this again.")  # fmt: skip
        selected = shlex.quote(str(manifest))
        is_beside = root == absolute(manifest.parent)
        flags = "" if is_beside else f" --data-root {shlex.quote(str(root))}"
        setting = "" if is_beside else f"DATA_ROOT={shlex.quote(str(root))} "
        print(f"For launchers: {setting}BENCHMARKS={selected} bash main_results/table1.sh")
    else:
        warn_about_other_manifest(manifest, benchmark, root)
    print(f"Next: python main_results/classify_clip.py --model clip-vit-l-336 --benchmark {selected}{flags}")


def own_benchmark(args: Args, class_list: Path) -> tuple[Benchmark, tuple[str, ...]]:
    """The user's own data set and its class names. Raises UserError for a name without --folder or --dataset."""
    check_name(args.benchmark, [*READERS, LLAVA_TEXTS])
    if args.benchmark in BENCHMARKS:
        raise UserError(f"{args.benchmark} is drawn by scripts/make_plane_figures.py: choose another name.")
    if args.archives or args.paper_manifests or not (args.folder or args.dataset):
        near = get_close_matches(args.benchmark, READERS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{args.benchmark} is none of {', '.join(READERS)}: give your own images with --folder DIR or "
                        f"--dataset NAME.{hint}")  # fmt: skip
    names = names_of_folder(args.folder) if args.folder else names_of_dataset(str(args.dataset), args.label_column)
    benchmark = Benchmark(
        args.benchmark, args.benchmark, JsonList(class_list), manifest=class_list.with_name(args.benchmark)
    )
    return benchmark, tuple(names)


def warn_about_other_manifest(manifest: Path, benchmark: Benchmark, root: Path) -> None:
    """Print a warning if the scripts would not read this manifest."""
    try:
        found = find_manifest(benchmark, root)
    except UserError:
        print(f"Move the manifest to {root} or {PROJECT_ROOT / 'data'}: the scripts look for it there.")
        return
    if not found.samefile(manifest):
        print(f"Note: the scripts will read {found}, which is another manifest: remove it or replace it with this one.")


def read_rows(args: Args, benchmark: Benchmark, finder: ClassFinder) -> tuple[list[Row], bool]:
    """Return the rows of the chosen source, and whether it is a third-party copy.

    Raises UserError for arguments that exclude each other and for a source that cannot be used.
    """
    chosen = [option for option in (args.archives, args.dataset, args.folder) if option is not None]
    if len(chosen) > 1:
        raise UserError("--archives, --dataset and --folder exclude each other: give only one of them.")
    if args.unpack_into and (args.dataset or args.folder):
        raise UserError("--unpack-into applies only to the official archives (--archives): leave it out.")
    if args.archives and args.archives.is_file():
        raise UserError(f"--archives {args.archives} is a file: give the folder that contains it.")
    folder = images_folder(args, benchmark)
    archives = absolute(args.archives) if args.archives else None
    source = Source(folder, args.download, args.any_checksum, archives).for_benchmark(benchmark.key)
    if args.paper_manifests:
        if args.dataset:
            raise UserError("--paper-manifests needs the official images (--archives or --folder), not --dataset.")
        file = find_paper_manifest(args.paper_manifests, benchmark)
        image_folders = {} if args.folder else find_image_folders(benchmark, source)
        return read_paper_rows(file, benchmark, finder.names, source.folders, image_folders), False
    if args.dataset:
        into = absolute(args.data_root) / benchmark.title if args.data_root else folder
        rows = read_dataset(args.dataset, into, finder, args.image_column, args.label_column, args.overwrite)
        return rows, True
    if args.folder:
        rows = read_folder(absolute(args.folder), finder)
        if benchmark.key not in BENCHMARKS:
            refuse_broken(rows)
        return rows, True
    return READERS[benchmark.key](source, finder), False


def refuse_broken(rows: list[Row]) -> None:
    """Raise UserError for files of the user that are no images, by their headers."""
    with ThreadPoolExecutor() as pool:
        sizes = pool.map(image_size, [row.image for row in rows])
    if broken := [row.image for row, size in zip(rows, sizes, strict=True) if size is None]:
        raise UserError(f"{len(broken):,} of {len(rows):,} files are no images, the first is {broken[0]}: remove them.")


def find_image_folders(benchmark: Benchmark, source: Source) -> dict[str, Path]:
    """Return the folders of the official images, unpacked; {} with a note when files are still missing."""
    if benchmark.key not in IMAGE_FOLDERS:
        return {}
    try:
        return IMAGE_FOLDERS[benchmark.key](source)
    except MissingFileError as error:
        print(f"Note: {error}")
        return {}


def data_root(args: Args, benchmark: Benchmark, rows: list[Row], out: Path) -> Path:
    """Return the folder that the manifest's image paths are relative to."""
    if args.data_root:
        return absolute(args.data_root)
    folder = images_folder(args, benchmark)
    candidates = [default_root(args.benchmark), PROJECT_ROOT, folder]
    if benchmark.key not in BENCHMARKS:
        candidates = [absolute(out), folder]  # the scripts look beside the manifest
    if args.archives:
        candidates.append(absolute(args.archives))
    first = rows[0].image
    if first.is_symlink():  # a hub cache: snapshots/X/... are links into blobs/ beside it
        candidates += [parent for parent in first.parents if (parent / "blobs").is_dir()]
    for root in candidates:
        # Through a link, the image may be outside the folder: the scripts would refuse to open it.
        if first.is_relative_to(root) and first.resolve().is_relative_to(root.resolve()):
            return root
    return folder


def images_folder(args: Args, benchmark: Benchmark) -> Path:
    """Return the folder that has the images or will have them after unpacking."""
    return absolute(args.folder or args.unpack_into or args.archives or PROJECT_ROOT / "data" / benchmark.title)


def default_root(key: str) -> Path:
    """Return the scripts' data root without --data-root: the benchmark's folder in paths.toml, else this project."""
    return absolute(local_path("benchmarks", key) or PROJECT_ROOT)


def absolute(path: Path) -> Path:
    """Return the absolute path without "..". Links are kept: data/Flowers102 may be a link to another disk."""
    return Path(os.path.abspath(path))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
