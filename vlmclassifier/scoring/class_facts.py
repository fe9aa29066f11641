"""What is known of two class lists beyond their names: ImageNet's WordNet lemmas and ReaL labels, the cars' years.

Both come with timm (`ImageNetInfo`, `RealLabelsImagenet`); its files are read without importing torch.
"""

import csv
import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vlmclassifier.benchmarks import BENCHMARKS, class_names

VALIDATION_FILE = re.compile(r"ILSVRC2012_val_(\d{8})")


@cache
def imagenet_names() -> tuple[str, ...]:
    """The canonical class names of ImageNet."""
    return class_names(BENCHMARKS["imagenet"])


@cache
def car_names() -> tuple[str, ...]:
    """The canonical class names of StanfordCars."""
    return class_names(BENCHMARKS["cars"])


def _info(name: str) -> Path:
    return Path(str(find_spec("timm").origin)).parent / "data" / "_info" / name


@cache
def synsets() -> tuple[str, ...]:
    """By class index the WordNet ids: "n01440764", ..."""
    return tuple(_info("imagenet_synsets.txt").read_text(encoding="utf-8").split())


@cache
def lemmas() -> tuple[tuple[str, ...], ...]:
    """By class index all names that WordNet has for the class, in lower case: ("electric ray", "crampfish", ...)."""
    with open(_info("imagenet_synset_to_lemma.txt"), newline="", encoding="utf-8") as stream:
        names = dict(csv.reader(stream, delimiter="\t"))
    return tuple(tuple(name.strip().lower() for name in names[synset].split(",")) for synset in synsets())


@cache
def real_labels() -> dict[str, tuple[int, ...]]:
    """By validation file all classes that people saw in the image (Beyer et al. 2020); none where none is agreed."""
    labels = json.loads(_info("imagenet_real_labels.json").read_text(encoding="utf-8"))
    return {f"ILSVRC2012_val_{number:08}": tuple(some) for number, some in enumerate(labels, start=1)}


def validation_file(example_id: str) -> str:
    """ILSVRC2012_val_00000017 of a path that holds it; "" for all others."""
    found = VALIDATION_FILE.search(example_id.rpartition("/")[2])
    return found.group(0) if found else ""


def without_year(name: str) -> str:
    """A car's make and model: "Tesla Model S Sedan" of "2012 Tesla Model S Sedan"."""
    return re.sub(r"^\d{4} ", "", name)
