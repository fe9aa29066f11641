"""The benchmarks: which classes, which pictures, in which order."""

import ast
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from vlmclassifier.paths import PROJECT_ROOT, local_path, near_miss
from vlmclassifier.records import Example, UserError

SHUFFLE_SEED = 1234  # the paper's evaluation order; a sub-sample is its head


@dataclass(frozen=True)
class Benchmark:
    """A benchmark; `key` is the dataset column of `paper.csv`."""

    key: str
    title: str
    test_split: str = "test"
    manifest: Path | None = None  # None: KEY.jsonl in the data root, else in data/
    classes: Path | None = None  # None: the canonical list of `class_names`


PAPER_BENCHMARKS = {
    benchmark.key: benchmark
    for benchmark in (
        Benchmark("imagenet", "ImageNet", test_split="valid"),
        Benchmark("flowers", "Flowers102"),
        Benchmark("cars", "StanfordCars"),
        Benchmark("caltech", "Caltech101"),
    )
}
# PlaneFigures is the embedded world: scripts/make_plane_figures.py draws it.
BENCHMARKS = PAPER_BENCHMARKS | {"plane_figures": Benchmark("plane_figures", "PlaneFigures")}

FLOWER_RENAMES = {
    "globe-flower": "globe flower",
    "pink-yellow dahlia?": "pink and yellow dahlia",
    "ball moss": "air plant",
}


def find_benchmark(name: str, classes: Path | None = None) -> Benchmark:
    """The registered benchmark `name`, or one made of a manifest file and its class list.

    Raises UserError for an unknown name (the nearest is named) and for a manifest without a class list.
    """
    if name in BENCHMARKS:
        if classes is not None:
            raise UserError(f"--classes {classes} goes with a manifest of your own: {name} has its canonical list.")
        return BENCHMARKS[name]
    if not name.endswith(".jsonl"):
        near = get_close_matches(name, BENCHMARKS, 1, 0.0)[0]
        raise UserError(
            f"Unknown benchmark {name!r}: the nearest is {near!r}; choose one of {', '.join(BENCHMARKS)} "
            "or a manifest file FILE.jsonl with --classes FILE.json."
        )
    if classes is None:
        raise UserError(f"{name} needs its class list: add --classes FILE.json, a JSON array of names.")
    manifest = Path(name)
    if manifest.stem in BENCHMARKS:
        raise UserError(
            f"{name} bears the name of a registered benchmark: use --benchmark {manifest.stem} --data-root "
            f"{manifest.parent} for the paper's classes, or rename your own manifest."
        )
    if not manifest.is_file():
        raise UserError(f"The manifest {name} does not exist: data/README.md says how to write one.")
    return Benchmark(manifest.stem, manifest.stem, manifest=manifest, classes=Path(classes))


def class_names(benchmark: Benchmark) -> tuple[str, ...]:
    """Class names in the order of the class index (paper section 0: the sources of the four lists).

    Raises UserError when a class file is missing, malformed or has no two names.
    """
    if benchmark.key == "imagenet" and benchmark.classes is None:
        return _literal_of("open_clip", "zero_shot_metadata.py", "IMAGENET_CLASSNAMES")
    if benchmark.key == "flowers" and benchmark.classes is None:
        names = _literal_of("torchvision", "datasets/flowers102.py", "classes")
        return tuple(FLOWER_RENAMES.get(name, name) for name in names)
    if benchmark.key == "plane_figures" and benchmark.classes is None:
        from vlmclassifier.plane_figures.figures import FIGURES

        return tuple(FIGURES)
    file = benchmark.classes or Path(__file__).parent / "class_names" / f"{benchmark.key}.json"
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"The class list {file} does not exist: write a JSON array of names there.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"The class list {file} cannot be read ({error}): it must be a JSON array of names.") from None
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"The class list {file} must be a JSON array of at least two non-empty names.")
    return tuple(names)


def _literal_of(package: str, file: str, name: str) -> tuple[str, ...]:
    """The literal assigned to `name` in an installed package's source.

    Reading costs milliseconds; importing either package costs seconds of torch, which this floor does without.
    """
    source = Path(find_spec(package).origin).parent / file
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            return tuple(ast.literal_eval(node.value))
    raise ImportError(f"{source} no longer defines {name}: install the versions of constraints.txt")


def data_root(benchmark: Benchmark, given: Path | None = None) -> Path:
    """The folder that the manifest's image paths start from: --data-root, paths.toml, else the manifest's place."""
    root = given or local_path("benchmarks", benchmark.key)
    if root is None:
        root = benchmark.manifest.parent if benchmark.manifest else PROJECT_ROOT
    if not root.is_dir():
        raise UserError(
            f"The data root {root} of {benchmark.key} is not a folder: set --data-root or name it in "
            "paths.toml below [benchmarks]."
        )
    return root


def find_manifest(benchmark: Benchmark, root: Path) -> Path:
    """The manifest file: the benchmark's own, else KEY.jsonl in the data root, else data/KEY.jsonl."""
    places = [root / f"{benchmark.key}.jsonl", PROJECT_ROOT / "data" / f"{benchmark.key}.jsonl"]
    if benchmark.manifest:
        return benchmark.manifest
    for file in places:
        if file.is_file():
            return file
    remedy = (
        "run scripts/quickstart.sh and give --data-root outputs/plane_figures/seed-0/pictures, or draw them with "
        "scripts/make_plane_figures.py --out DIR"
        if benchmark.key == "plane_figures"
        else f"write it with python scripts/prepare_data.py {benchmark.key} (data/README.md)"
    )
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
        lines = file.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"The manifest {file} cannot be read as UTF-8 text: {error}.") from None
    positions = name_positions(names)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.name} row {number}"
        values = parse_row(line, where)
        index = class_index(values, positions, where)
        image, row_split = values["image"], values["split"]
        if image in splits:
            raise UserError(f"{where}: the image {image} stands in an earlier row too: keep one of them.")
        splits[image] = row_split
        if split in ("all", row_split):
            place, note = f"{file} row {number}", values.get("note", "")
            examples[image] = Example(
                image, benchmark.key, str(root / image), values["label"], index, row_split, place, note
            )
    if not examples:
        have = ", ".join(sorted(set(splits.values()))) or "none"
        raise UserError(f"{file} has no row of the split {split!r}: its splits are {have}; set --split (or all).")
    return list(examples.values())


def parse_row(line: str, where: str) -> dict:
    """The fields of one manifest row, checked for form. Raises UserError that names the row."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): mend or remove the row.") from None
    if not isinstance(values, dict):
        raise UserError(f'{where} is not a JSON object: write {{"image": ..., "label": ..., "split": ...}}.')
    for key in ("image", "label", "split"):
        if not isinstance(values.get(key), str) or not values[key]:
            raise UserError(f"{where} has no text under {key!r}: every row needs image, label and split.")
    if not isinstance(values.get("note", ""), str):
        raise UserError(f"{where} has a note that is not text: mend or remove it.")
    image = values["image"]
    if image.startswith("/") or (".." in image and ".." in PurePosixPath(image).parts):
        raise UserError(f"{where}: the image path {image} leaves the data root: write it relative to that folder.")
    return values


def name_positions(names: Sequence[str]) -> dict[str, list[int]]:
    """Where each name stands in the class list: ImageNet's "missile" and "sunglasses" stand there twice."""
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        positions.setdefault(name, []).append(position)
    return positions


def class_index(values: dict, positions: dict[str, list[int]], where: str) -> int:
    """The class of one manifest row. Raises UserError for a label that is none, or another than label_idx's."""
    label, given = values["label"], values.get("label_idx")
    found = positions.get(label)
    if not found:
        near = get_close_matches(label, positions, 1, 0.0)[0]
        raise UserError(f"{where}: the label {label!r} is not in the class list: the nearest is {near!r}.")
    if given is None and len(found) == 1:
        return found[0]
    if given not in found or type(given) is not int:
        raise UserError(
            f"{where}: the label {label!r} is class {' or '.join(map(str, found))}, but label_idx is {given}: mend it."
        )
    return given


def evaluation_order(examples: Sequence[Example], limit: int | None = None) -> list[Example]:
    """The paper's order: rows of the split, shuffled with seed 1234; a limit takes the head (paper section 0)."""
    shuffled = list(examples)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    return shuffled[:limit]


def check_files(examples: Sequence[Example]) -> None:
    """Raise UserError when a picture is missing, before anything expensive starts; the first one is named."""
    missing = [example for example in examples if not Path(example.image).is_file()]
    if missing:
        first = missing[0]
        raise UserError(
            f"{first.image} ({first.row}) does not exist, and {len(missing) - 1} more of {len(examples)} pictures: "
            "set --data-root to the folder that the manifest's paths start from."
        )


@dataclass(frozen=True)
class Evaluation:
    """What one run evaluates: the examples in the paper's order, with their classes and where they lie."""

    benchmark: Benchmark
    names: tuple[str, ...]
    root: Path
    split: str
    manifest_hash: str
    examples: list[Example]
    marks: dict[str, str]  # what a run's configuration says of the split beyond its hash: the manifest's notes, if any


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
    marks = {"note": ", ".join(notes)} if notes else {}
    return Evaluation(benchmark, names, folder, chosen, manifest_hash, examples, marks)
