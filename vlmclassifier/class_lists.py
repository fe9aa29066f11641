"""The class names of each benchmark, read from where they are defined.

open_clip and torchvision are read as source text: that takes milliseconds, importing either takes seconds of torch.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from vlmclassifier.records import UserError

PACKAGED = Path(__file__).parent / "class_names"

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
        """The names. Raises UserError when the file is missing, malformed or has fewer than two names."""
        file = self.file
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"The class list {file} does not exist: write a JSON array of names there.") from None
        except (ValueError, OSError) as error:
            raise UserError(
                f"The class list {file} cannot be read ({error}): it must be a JSON array of names."
            ) from None
        if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"The class list {file} must be a JSON array of at least two non-empty names.")
        return tuple(names)


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


def first_index(names: tuple[str, ...] | list[str]) -> dict[str, int]:
    """The first class index of each name."""
    return {name: positions[0] for name, positions in name_positions(names).items()}
