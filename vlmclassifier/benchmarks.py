"""The registry of benchmarks, and what a run evaluates: which images, in which order."""

import hashlib
import json
import os
import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from vlmclassifier import class_lists
from vlmclassifier.class_lists import ClassList, JsonList, name_positions
from vlmclassifier.paths import PROJECT_ROOT, local_path, near_miss, trusted_roots
from vlmclassifier.records import Example, UserError

ROW_FORM = '{"image": ..., "label": ..., "split": ...}'
SHUFFLE_SEED = 1234  # the paper's evaluation order; a sub-sample is its head


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, data only; `key` is the dataset column of `paper.csv`."""

    key: str
    title: str
    class_list: ClassList
    test_split: str = "test"
    manifest: Path | None = None  # None: KEY.jsonl in the data root, else in data/
    paper_rows: Mapping[str, int] = field(default_factory=dict)  # rows of each split in the paper; {}: not in the paper
    paper_rows_sha256: str | None = None  # of the paper's rows, see preparing.manifests.rows_digest
    remedy: str = ""  # what to do when its manifest is missing; "": prepare_data.py writes it
    own_train_images: int | None = None  # where paper_rows, which a manifest must have, do not say it

    @property
    def train_images(self) -> int | None:
        """The number of train images in the paper; None where it is not in the paper."""
        return self.paper_rows.get("train", self.own_train_images)


BENCHMARKS = {
    benchmark.key: benchmark
    for benchmark in (
        # The paper's ImageNet rows are the official validation set; no table needs its train split here.
        Benchmark("imagenet", "ImageNet", class_lists.IMAGENET, "valid", paper_rows={"valid": 50_000},
                  own_train_images=1_281_167),
        Benchmark(
            "flowers", "Flowers102", class_lists.FLOWERS, paper_rows={"train": 2_040, "test": 6_149},
            paper_rows_sha256="e153b8207278072ccf6d7d95ebe5ebe31cc42effc5a4021301d90a5682e6da1d",
        ),
        Benchmark(
            "cars", "StanfordCars", class_lists.CARS, paper_rows={"train": 8_144, "test": 8_041},
            paper_rows_sha256="7f118cdd8ce75a7dec111202930b0cda6317c7a8aaecf14d70c65b3d0300305b",
        ),
        Benchmark(
            "caltech", "Caltech101", class_lists.CALTECH, paper_rows={"train": 4_346, "test": 4_331},
            paper_rows_sha256="f11a0f967bffe3ba329a9b6ea89a327ceee3f385e416de15135d26eff443abb4",
        ),
        # The embedded data set, drawn by scripts/make_plane_figures.py.
        Benchmark(
            "plane_figures", "PlaneFigures", class_lists.PLANE_FIGURES,
            remedy="run scripts/quickstart.sh and give --data-root outputs/plane_figures/seed-0/images, or draw them "
            "with scripts/make_plane_figures.py --out DIR",
        ),
    )
}  # fmt: skip
PAPER_BENCHMARKS = {key: benchmark for key, benchmark in BENCHMARKS.items() if benchmark.paper_rows}


def find_benchmark(name: str, classes: Path | None = None) -> Benchmark:
    """The registered benchmark `name`, or one made of a manifest file and its class list.

    Raises UserError for an unknown name (the nearest is named) and for a manifest without a class list.
    """
    if name in BENCHMARKS:
        if classes is not None:
            raise UserError(f"--classes {classes} goes with a manifest of your own: {name} has its canonical list.")
        return BENCHMARKS[name]
    manifest = Path(name)
    if manifest.is_dir():
        raise UserError(f"{name} is a folder: write its manifest with python scripts/prepare_data.py NAME --folder "
                        f"{name}, and give that file.")  # fmt: skip
    if manifest.is_file() and manifest.suffix != ".jsonl":
        raise UserError(f"{name} is no manifest: that is a file FILE.jsonl of JSON lines {ROW_FORM}.")
    if manifest.suffix != ".jsonl":
        near = get_close_matches(name, BENCHMARKS, 1)
        raise UserError(
            f"Unknown benchmark {name!r}{f': did you mean {near[0]!r}?' if near else ':'} Choose one of "
            f"{', '.join(BENCHMARKS)}, or a manifest file FILE.jsonl with --classes FILE.json."
        )
    if not manifest.is_file():
        raise UserError(f"The manifest {name} does not exist: data/README.md says how to write one.")
    beside = manifest.with_name(f"{manifest.stem}_classes.json")  # as prepare_data.py writes it
    if classes is None and beside.is_file():
        classes = beside
    if classes is None:
        raise UserError(f"{name} needs its class list: add --classes FILE.json, a JSON array of names.")
    if manifest.stem in BENCHMARKS:
        raise UserError(
            f"{name} has the name of a registered benchmark: use --benchmark {manifest.stem} --data-root "
            f"{manifest.parent} for the registered classes, or rename your own manifest."
        )
    return Benchmark(manifest.stem, manifest.stem, JsonList(Path(classes)), manifest=manifest)


def class_names(benchmark: Benchmark) -> tuple[str, ...]:
    """Class names in the order of the class index. Raises UserError when a class file cannot be used."""
    return benchmark.class_list.read()


def data_root(benchmark: Benchmark, given: Path | None = None) -> Path:
    """The folder that the manifest's image paths start from: --data-root, paths.toml, else the manifest's folder.

    Raises UserError when that is not a folder.
    """
    root = given or local_path("benchmarks", benchmark.key)
    if root is None:
        root = benchmark.manifest.parent if benchmark.manifest else PROJECT_ROOT
    if not root.is_dir():
        raise UserError(
            f"The data root {root} of {benchmark.key} is not a folder: set --data-root or name it in "
            "paths.toml in [benchmarks]."
        )
    return root


def find_manifest(benchmark: Benchmark, root: Path) -> Path:
    """The manifest file: the benchmark's own, else KEY.jsonl in the data root, else data/KEY.jsonl.

    Raises UserError where there is none.
    """
    places = [root / f"{benchmark.key}.jsonl", PROJECT_ROOT / "data" / f"{benchmark.key}.jsonl"]
    if benchmark.manifest:
        return benchmark.manifest
    for file in places:
        if file.is_file():
            return file
    remedy = benchmark.remedy or f"write it with python scripts/prepare_data.py {benchmark.key} (data/README.md)"
    hint = near_miss("benchmarks", benchmark.key, BENCHMARKS)
    raise UserError(f"The manifest {places[0]} (or {places[1]}) does not exist: {remedy}.{hint}")


def load_examples(benchmark: Benchmark, names: Sequence[str], root: Path, split: str) -> list[Example]:
    """The rows of one split (or "all") in the order of the manifest.

    Every row is checked, also those of other splits: form, label, unique image path, no path that leaves the root.
    Raises UserError that names the file and the row.
    """
    file = find_manifest(benchmark, root)
    examples, splits = {}, {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file.name} row {row} is not UTF-8 text (Latin-1 perhaps): save {file} as UTF-8.") from None
    except OSError as error:
        raise UserError(f"The manifest {file} cannot be read: {error}.") from None
    positions, roots = name_positions(names), [Path(os.path.abspath(folder)) for folder in (root, *trusted_roots())]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.name} row {number}"
        values = parse_row(line, where, roots, needs_split=split != "all")
        index = class_index(values, positions, where)
        image, row_split = values["image"], values["split"]
        if image in splits:
            raise UserError(f"{where}: the image {image} is in an earlier row too: keep one of them.")
        splits[image] = row_split
        if split in ("all", row_split):
            place, note = f"{file} row {number}", values.get("note", "")
            examples[image] = Example(image, str(root / image), values["label"], index, row_split, place, note)
    if not examples:
        have = ", ".join(sorted(set(splits.values()))) or "none"
        raise UserError(f"{file} has no row of the split {split!r}: its splits are {have}; set --split (or all).")
    return list(examples.values())


def parse_row(line: str, where: str, roots: Sequence[Path] = (), needs_split: bool = True) -> dict:
    """The fields of one manifest row, checked for form; `roots`: where absolute image paths may lead to.

    `needs_split`: whether a row without a split is refused; else its split is "all". Raises UserError that names the
    row.
    """
    try:
        values = json.loads(line)
    except ValueError as error:
        if "," in line and not line.lstrip().startswith("{"):
            raise UserError(f"{where} is not JSON, the file looks like CSV: a manifest has lines {ROW_FORM}.") from None
        raise UserError(f"{where} is not JSON ({error}): fix or remove the row.") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object: write {ROW_FORM}.")
    if not needs_split:
        values.setdefault("split", "all")
    for key in ("image", "label", "split"):
        if not isinstance(values.get(key), str) or not values[key]:
            hint = " (or give --split all)" if key == "split" else ""
            raise UserError(f"{where} has no text under {key!r}: every row needs image, label and split{hint}.")
    if not isinstance(values.get("note", ""), str):
        raise UserError(f"{where} has a note that is not text: fix or remove it.")
    values["label"] = unicodedata.normalize("NFC", values["label"])  # as in the class list; macOS writes another form
    image = values["image"]
    is_trusted = image.startswith("/") and any(Path(image).is_relative_to(root) for root in roots)
    if (image.startswith("/") and not is_trusted) or (".." in image and ".." in PurePosixPath(image).parts):
        raise UserError(
            f"{where}: the image path {image} leaves the data root: write it relative to that folder, or add its "
            "folder to [trusted_roots] in paths.toml."
        )
    return values


def class_index(values: dict, positions: dict[str, list[int]], where: str) -> int:
    """The class of one manifest row. Raises UserError for an unknown label, or one that contradicts label_idx."""
    label, given = values["label"], values.get("label_idx")
    found = positions.get(label)
    if not found:
        near = get_close_matches(label, positions, 1)
        hint = f"did you mean {near[0]!r}?" if near else "fix the row, or add the class to the list."
        raise UserError(f"{where}: the label {label!r} is not in the class list: {hint}")
    if given is None and len(found) == 1:
        return found[0]
    if given not in found or type(given) is not int:
        raise UserError(
            f"{where}: the label {label!r} is class {' or '.join(map(str, found))}, but label_idx is {given}: fix it."
        )
    return given


def evaluation_order(examples: Sequence[Example], limit: int | None = None) -> list[Example]:
    """The paper's order: rows of the split, shuffled with seed 1234; a limit takes the head (paper, section 2)."""
    shuffled = list(examples)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return shuffled[:limit]


def check_files(examples: Sequence[Example]) -> None:
    """Raise UserError when an image is missing, before anything expensive starts; the first one is named."""
    missing = [example for example in examples if not Path(example.image).is_file()]
    if missing:
        first, found = missing[0], len(examples) - len(missing)
        remedy = "set --data-root to the folder that the manifest's paths start from (of launchers DATA_ROOT)."
        if found:  # the root is right
            remedy = "put them there, or remove their rows from the manifest."
        raise UserError(
            f"{len(missing):,} of {len(examples):,} images do not exist ({found:,} do), the first is {first.image} "
            f"({first.row}): {remedy}"
        )


@dataclass(frozen=True)
class Evaluation:
    """What one run evaluates: the examples in the paper's order, their classes and the data root."""

    benchmark: Benchmark
    names: tuple[str, ...]
    root: Path
    split: str
    manifest_hash: str
    examples: list[Example]
    tags: tuple[str, ...]  # another split than the test split, or only some of its rows; the notes of the manifest
    skipped: tuple[str, ...] = ()  # ids of images that cannot be opened, by --skip-broken-images

    @property
    def order(self) -> list[str]:
        """The example ids in the evaluation order."""
        return [example.id for example in self.examples]

    @property
    def labels(self) -> dict[str, str]:
        """The label of every example id."""
        return {example.id: example.label for example in self.examples}


def load_evaluation(
    name: str, classes: Path | None = None, root: Path | None = None, split: str | None = None, limit: int | None = None
) -> Evaluation:
    """Everything that --benchmark, --classes, --data-root, --split and --limit say, checked before any model loads.

    Raises UserError for any of the mistakes named in this module.
    """
    benchmark = find_benchmark(name, classes)
    names = class_names(benchmark)
    folder = data_root(benchmark, root)
    chosen = split or benchmark.test_split
    rows = load_examples(benchmark, names, folder, chosen)
    notes = sorted({row.note for row in rows} - {""})  # of all rows: a larger limit must not change them
    examples = evaluation_order(rows, limit)
    check_files(examples)
    manifest_hash = hashlib.sha256(find_manifest(benchmark, folder).read_bytes()).hexdigest()
    tags = () if chosen == benchmark.test_split else (f"split {chosen}",)
    papers = benchmark.paper_rows.get(chosen)
    if papers is not None and len(rows) != papers and chosen == benchmark.test_split:
        tags = (f"{len(rows):,} of {papers:,} images",)
    return Evaluation(benchmark, names, folder, chosen, manifest_hash, examples, (*tags, *notes))
