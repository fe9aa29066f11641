"""The label trie: the token sequences of all class names as one tree, in which a shared beginning stands once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmclassifier.records import UserError


@dataclass(frozen=True)
class LabelTrie:
    """Nodes in preorder, so that a subtree is a range of numbers; node 0 is the prompt's last token.

    `fed`: the token that a node feeds to the model; `read`: the token whose log-probability, given the path to the
    parent, is the node's. They are the same but for the reference's own tokenisation (`names.name_tokens`).
    """

    fed: np.ndarray  # [nodes]; -1 at the root
    read: np.ndarray  # [nodes]; -1 at the root
    parent: np.ndarray  # [nodes]; -1 at the root
    depth: np.ndarray  # [nodes]
    end: np.ndarray  # [nodes] one past the last node of the subtree
    name_node: np.ndarray  # [names] where each name ends

    @property
    def size(self) -> int:
        """The number of nodes, the root included."""
        return len(self.parent)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each name [names]."""
        return self.depth[self.name_node]

    @cached_property
    def inner(self) -> np.ndarray:
        """The nodes that have children, in preorder, the root first: all that a model has to run."""
        return np.unique(self.parent[1:])

    @cached_property
    def _children(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.parent[1:], kind="stable") + 1  # children of node 0, of node 1, ...
        return order, np.searchsorted(self.parent[order], np.arange(self.size + 1))

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children [edges] of some nodes, and the place in `nodes` of each child's parent [edges]."""
        order, start = self._children
        counts = start[nodes + 1] - start[nodes]
        place = np.repeat(np.arange(len(nodes)), counts)
        within = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        return order[start[nodes][place] + within], place

    def ancestors(self, node: int) -> list[int]:
        """The nodes between the root and `node`, both left out, from the top."""
        path = []
        while (node := int(self.parent[node])) > 0:
            path.append(node)
        return path[::-1]

    def ancestry(self, keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Whether each key is each query itself or an ancestor of it: bool [..., queries, keys]; -1 is no node."""
        keys, queries = keys[..., None, :], queries[..., :, None]
        return (keys >= 0) & (keys <= queries) & (queries < self.end[keys])

    def chunks(self, limit: int) -> list[tuple[list[int], np.ndarray]]:
        """The inner nodes below the root in runs of at most `limit`, each with the earlier nodes it looks back at.

        In preorder the ancestors that a run does not hold itself are those of its first node: a handful at most.
        """
        below = self.inner[1:]
        runs = [below[start : start + limit] for start in range(0, len(below), limit)]
        return [(self.ancestors(run[0]), run) for run in runs]

    def path_sums(self, log_probs: np.ndarray) -> np.ndarray:
        """Summed log-probabilities of the names [..., names] from those of the nodes [..., nodes]."""
        sums = np.zeros(log_probs.shape, dtype=np.float64)
        for depth in range(1, int(self.depth.max()) + 1):
            nodes = np.flatnonzero(self.depth == depth)
            sums[..., nodes] = sums[..., self.parent[nodes]] + log_probs[..., nodes]
        return sums[..., self.name_node]


def build_trie(fed: Sequence[Sequence[int]], read: Sequence[Sequence[int]] | None = None) -> LabelTrie:
    """The trie over token sequences, one per name. Raises UserError for a name without tokens.

    `read`: the tokens whose log-probabilities count, where they are not those that are fed.
    """
    pairs = [tuple(zip(f, r, strict=True)) for f, r in zip(fed, read or fed, strict=True)]
    for number, sequence in enumerate(pairs):
        if not sequence:
            raise UserError(f"Class name number {number} has no tokens: the model's tokenizer drops it; rename it.")
    tokens, parent, depth = [(-1, -1)], [-1], [0]
    name_node = np.zeros(len(pairs), dtype=np.int64)
    path, previous = [0], ()
    for number in sorted(range(len(pairs)), key=pairs.__getitem__):  # sorted sequences visit the tree in preorder
        sequence = pairs[number]
        shared = next((i for i, (a, b) in enumerate(zip(sequence, previous, strict=False)) if a != b),
                      min(len(sequence), len(previous)))  # fmt: skip
        del path[shared + 1 :]
        for token in sequence[shared:]:
            tokens.append(token)
            parent.append(path[-1])
            depth.append(len(path))
            path.append(len(tokens) - 1)
        name_node[number], previous = path[-1], sequence
    end = np.arange(1, len(tokens) + 1)
    for node in range(len(tokens) - 1, 0, -1):
        end[parent[node]] = max(end[parent[node]], end[node])
    fed_tokens, read_tokens = np.array(tokens, dtype=np.int64).T
    return LabelTrie(fed_tokens, read_tokens, np.array(parent), np.array(depth), end, name_node)
