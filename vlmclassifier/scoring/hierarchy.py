"""A tree of names above the classes: the deepest one that a model can say with a given certainty.

The probability of a node is the sum over the classes below it (Deng et al., "Hedging Your Bets", 2012); beyond the
paper. A node may have several parents: a class is counted once below each of its ancestors.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmclassifier.records import UserError
from vlmclassifier.scoring.guidance import BLOCK

CERTAINTIES = (0.5, 0.75, 0.9, 0.95)
ROOT = "any class"  # above the nodes without parents, where there are several
WORDNET = Path(__file__).parents[1] / "class_names" / "imagenet_hierarchy.json"


@dataclass(frozen=True)
class Hierarchy:
    """Nodes above and including the classes. `parents`: node -> its parents; `leaves`: the node of every class."""

    leaves: tuple[str, ...]  # [classes]
    parents: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]

    @cached_property
    def nodes(self) -> list[str]:
        """All nodes that have a class below them, parents before children."""
        order: dict[str, None] = {}

        def visit(node: str, path: tuple[str, ...]) -> None:
            if node in path:
                raise UserError(f"The hierarchy has a circle at {node!r}: fix its parents.")
            if node not in order:
                for parent in self.parents.get(node, ()):
                    visit(parent, (*path, node))
                order[node] = None

        for leaf in self.leaves:
            visit(leaf, ())
        return list(order)

    @cached_property
    def depth(self) -> dict[str, int]:
        """Node -> the number of steps on its longest way to the root."""
        found: dict[str, int] = {}
        for node in self.nodes:
            found[node] = max((found[parent] + 1 for parent in self.parents.get(node, ())), default=0)
        return found

    @cached_property
    def below(self) -> np.ndarray:
        """Whether a class is below a node or is it: bool [nodes, classes]."""
        place = {node: number for number, node in enumerate(self.nodes)}
        found = np.zeros((len(place), len(self.leaves)), dtype=bool)
        for number, leaf in enumerate(self.leaves):
            pending = [leaf]
            while pending:
                node = pending.pop()
                if not found[place[node], number]:
                    found[place[node], number] = True
                    pending += self.parents.get(node, ())
        return found

    def deepest(self, probabilities: np.ndarray, certainty: float) -> np.ndarray:
        """Places in `nodes` [images]: of each image the deepest node whose classes have this probability together.

        `probabilities`: [images, classes]. Of equally deep nodes the likelier counts, then the first. The root has them
        all.
        """
        below = self.below.T.astype(probabilities.dtype)  # [classes, nodes]
        depth = np.array([self.depth[node] for node in self.nodes], dtype=float)
        chosen = []
        for start in range(0, len(probabilities), BLOCK):
            sums = probabilities[start : start + BLOCK] @ below  # [block, nodes]
            allowed = (sums >= certainty) | (depth == 0)  # rounding may leave the root below 1
            value = np.where(allowed, depth + np.clip(sums, 0, 1) / 2, -1.0)  # the probability is half a step at most
            chosen.append(value.argmax(axis=1))
        return np.concatenate(chosen)


class Named(NamedTuple):
    """What a model can say with one certainty, over some images."""

    certainty: float
    accuracy: float  # the true class is below the node, from 0 to 1
    depth: float  # mean depth of the node
    classes: float  # mean number of classes below it
    leaf: float  # share of images for which it is one class
    n: int


def hierarchical(hierarchy: Hierarchy, probabilities: np.ndarray, truth: np.ndarray, certainty: float) -> Named:
    """Accuracy and depth of the deepest nodes. `truth`: the class of each image [images]."""
    chosen = hierarchy.deepest(probabilities, certainty)
    depth = np.array([hierarchy.depth[node] for node in hierarchy.nodes])
    sizes = hierarchy.below.sum(axis=1)
    right = hierarchy.below[chosen, truth]
    return Named(certainty, float(right.mean()), float(depth[chosen].mean()), float(sizes[chosen].mean()),
                 float((sizes[chosen] == 1).mean()), len(truth))  # fmt: skip


def make_hierarchy(
    names: Sequence[str], leaves: Mapping[str, str], parents: Mapping[str, Sequence[str]],
    node_names: Mapping[str, str] | None = None,
) -> Hierarchy:  # fmt: skip
    """A hierarchy of these classes; `leaves`: class name -> node. Raises UserError for a class without a node."""
    missing = [name for name in names if name not in leaves]
    if missing:
        raise UserError(f"The hierarchy has no node of {missing[0]!r} ({len(missing)} of {len(names)} classes).")
    found = {node: tuple(above) for node, above in parents.items()}
    known = set(found) | {leaves[name] for name in names}
    for node, above in found.items():
        if unknown := [parent for parent in above if parent not in known]:
            raise UserError(f"The hierarchy's node {node!r} has the parent {unknown[0]!r}, which it does not contain.")
    words = dict(node_names or {})
    hierarchy = Hierarchy(tuple(leaves[name] for name in names), found, words)
    roots = [node for node in hierarchy.nodes if not found.get(node)]
    if len(roots) > 1:
        found |= {root: (ROOT,) for root in roots}
        hierarchy = Hierarchy(hierarchy.leaves, found | {ROOT: ()}, words)
    return hierarchy


def read_hierarchy(file: Path, names: Sequence[str]) -> Hierarchy:
    """Read {"leaves": {class name: node}, "parents": {node: [nodes]}, "names": {node: words}} (names are optional).

    Without "leaves" the nodes are called like the classes. Raises UserError for another form.
    """
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        parents = {node: tuple(above) if isinstance(above, list) else (above,)
                   for node, above in stored["parents"].items()}  # fmt: skip
        leaves = stored.get("leaves") or {name: name for name in names if name in parents}
        return make_hierarchy(names, leaves, parents, stored.get("names"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{file} is no hierarchy ({error}): it is {{"leaves": {{class name: node}}, "parents": {{node: [nodes]}}}}.'
        ) from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def hierarchy_of(benchmark: str, names: Sequence[str], file: Path | None = None) -> Hierarchy | None:
    """The hierarchy of a benchmark: the file, WordNet's for ImageNet, families for PlaneFigures; None for others."""
    if file is not None:
        return read_hierarchy(file, names)
    if benchmark == "imagenet":
        return read_hierarchy(WORDNET, names)
    if benchmark == "plane_figures":
        from vlmclassifier.plane_figures import FIGURES

        kinds = {name: figure.family for name, figure in FIGURES.items()}
        parents: dict[str, tuple[str, ...]] = {"figure": ()}
        parents |= {f"a {kind}": ("figure",) for kind in kinds.values()}
        parents |= {name: (f"a {kind}",) for name, kind in kinds.items()}
        return make_hierarchy(names, {name: name for name in names}, parents)
    return None
