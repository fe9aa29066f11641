"""The class names of each benchmark, read from where they are defined.

open_clip and torchvision are read as source text: that takes milliseconds, importing either takes seconds of torch.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from vlmclassifier.records import UserError

PACKAGED = Path(__file__).parent / "class_names"

# What some tokenizer reads as a control token, wherever it stands: <image>, </s>, <|im_end|>, [INST], [IMG], ◁think▷.
CONTROL_TOKEN = re.compile(r"<[|｜/]?[A-Za-z_][^<>]*>|\[/?[A-Z_]{3,}\]|◁[^▷]*▷")

FLOWER_RENAMES = {  # torchvision's name -> the paper's
    "globe-flower": "globe flower",
    "pink-yellow dahlia?": "pink and yellow dahlia",
    "ball moss": "air plant",
}


@dataclass(frozen=True)
class JsonList:
    """A JSON array of names."""

    file: Path

    def read(self) -> tuple[str, ...]:
        """The names, in Unicode's composed form.

        Raises UserError when the file is missing, malformed, has fewer than two names or one with a control token.
        """
        file = self.file
        try:
            names = json.loads(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError(f"The class list {file} does not exist: write a JSON array of names there.") from None
        except (ValueError, OSError) as error:
            raise UserError(
                f"The class list {file} cannot be read ({error}): it must be a JSON array of names."
            ) from None
        if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"The class list {file} must be a JSON array of at least two non-empty names.")
        for name in names:
            if found := CONTROL_TOKEN.search(name):
                raise UserError(
                    f"The class list {file} has the name {name!r}: models read {found[0]!r} as a command, not as text; "
                    "rename the class."
                )
        return tuple(unicodedata.normalize("NFC", name) for name in names)


@dataclass(frozen=True)
class SourceLiteral:
    """A list literal assigned to `name` in the source of an installed package; `renames` change single names."""

    package: str
    file: str
    name: str
    renames: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> tuple[str, ...]:
        """The names. Raises ImportError when the package no longer defines them."""
        source = Path(str(find_spec(self.package).origin)).parent / self.file
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [self.name]:
                names = ast.literal_eval(node.value)
                return tuple(self.renames.get(name, name) for name in names)
        raise ImportError(f"{source} no longer defines {self.name}: install the versions of constraints.txt")


@dataclass(frozen=True)
class ModuleNames:
    """The keys or items of a variable of a light module of this package."""

    module: str
    name: str

    def read(self) -> tuple[str, ...]:
        """The names."""
        return tuple(getattr(import_module(self.module), self.name))


ClassList = JsonList | SourceLiteral | ModuleNames

IMAGENET = SourceLiteral("open_clip", "zero_shot_metadata.py", "IMAGENET_CLASSNAMES")
FLOWERS = SourceLiteral("torchvision", "datasets/flowers102.py", "classes", FLOWER_RENAMES)
CARS = JsonList(PACKAGED / "cars.json")
CALTECH = JsonList(PACKAGED / "caltech.json")
PLANE_FIGURES = ModuleNames("vlmclassifier.plane_figures.figures", "FIGURES")


def name_positions(names: tuple[str, ...] | list[str]) -> dict[str, list[int]]:
    """The class indices of each name: ImageNet's "missile" and "sunglasses" have two each."""
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        positions.setdefault(name, []).append(position)
    return positions


def same_for_model(names: Sequence[str], keys: Sequence[object]) -> list[tuple[str, ...]]:
    """The groups of different names that a model cannot tell apart; `keys`: what the model reads for each name."""
    groups: dict[object, list[str]] = {}
    for name, key in zip(names, keys, strict=True):
        group = groups.setdefault(key, [])
        if name not in group:
            group.append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def indistinct_warning(groups: Sequence[tuple[str, ...]], model: str) -> str:
    """A sentence about the groups of `same_for_model`."""
    shown = "; ".join(" = ".join(repr(name) for name in group[:4]) for group in groups[:3])
    return (
        f"warning: {model} cannot tell {sum(map(len, groups))} class names apart ({shown}): rename them if the classes "
        "differ; for CLIP and rankings the first always wins, an answer in words counts for all of them."
    )


def first_index(names: tuple[str, ...] | list[str]) -> dict[str, int]:
    """The first class index of each name."""
    return {name: positions[0] for name, positions in name_positions(names).items()}
