"""The label trie: the token sequences of all class names as one tree, in which a shared prefix is stored once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmclassifier.records import UserError


@dataclass(frozen=True)
class LabelTrie:
    """A tree of tokens. Its nodes are in preorder, so a subtree is a range; node 0 is the last token of the prompt.

    `input_ids`: the token that a node feeds to the model. `target_ids`: the token whose log-probability, given the path
    to the parent node, belongs to the node. They differ only with the tokenisation of the reference code
    (`NameTokens.trie`).
    """

    input_ids: np.ndarray  # [nodes]; -1 at the root
    target_ids: np.ndarray  # [nodes]; -1 at the root
    parent: np.ndarray  # [nodes]; -1 at the root
    depth: np.ndarray  # [nodes]
    end: np.ndarray  # [nodes] one past the last node of the subtree
    name_node: np.ndarray  # [names] the node of the last token of each name

    @property
    def size(self) -> int:
        """The number of nodes, including the root."""
        return len(self.parent)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each name: [names]."""
        return self.depth[self.name_node]

    @cached_property
    def inner(self) -> np.ndarray:
        """The inner nodes in preorder, the root first: [inner nodes]. Only these have to be run by the model."""
        return np.unique(self.parent[1:])

    @cached_property
    def _children(self) -> tuple[np.ndarray, np.ndarray]:
        """All nodes but the root, ordered by their parent: [nodes - 1]; and where each parent's start: [nodes + 1]."""
        order = np.argsort(self.parent[1:], kind="stable") + 1
        return order, np.searchsorted(self.parent[order], np.arange(self.size + 1))

    def children(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children [edges] of `nodes`, and for each child the index of its parent in `nodes`: [edges]."""
        order, start = self._children
        counts = start[nodes + 1] - start[nodes]  # [len(nodes)] the number of children
        parent_index = np.repeat(np.arange(len(nodes)), counts)  # [edges]
        within_parent = np.arange(len(parent_index)) - np.repeat(np.cumsum(counts) - counts, counts)  # [edges]
        return order[start[nodes][parent_index] + within_parent], parent_index

    def ancestors(self, node: int) -> list[int]:
        """The nodes between the root and `node`, from the top, without these two."""
        path = []
        while (node := int(self.parent[node])) > 0:
            path.append(node)
        return path[::-1]

    def ancestry(self, keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Whether each key is the query itself or an ancestor of it.

        `keys` [..., keys] and `queries` [..., queries] are nodes; -1 is padding. Returns bool [..., queries, keys].
        """
        keys, queries = keys[..., None, :], queries[..., :, None]
        return (keys >= 0) & (keys <= queries) & (queries < self.end[keys])

    def chunks(self, limit: int) -> list[tuple[list[int], np.ndarray]]:
        """The inner nodes below the root in chunks of at most `limit`, each with the earlier nodes that it attends to.

        Because of the preorder, the ancestors outside a chunk are those of its first node.
        """
        nodes = self.inner[1:]
        chunks = [nodes[start : start + limit] for start in range(0, len(nodes), limit)]
        return [(self.ancestors(chunk[0]), chunk) for chunk in chunks]

    def path_sums(self, log_probs: np.ndarray) -> np.ndarray:
        """Summed log-probabilities of the names [..., names] in float64, from those of the nodes [..., nodes]."""
        sums = np.zeros(log_probs.shape, dtype=np.float64)
        for depth in range(1, int(self.depth.max()) + 1):
            nodes = np.flatnonzero(self.depth == depth)
            sums[..., nodes] = sums[..., self.parent[nodes]] + log_probs[..., nodes]
        return sums[..., self.name_node]


def build_trie(input_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]] | None = None) -> LabelTrie:
    """The trie of token sequences, one per name.

    `target_ids`: the tokens whose log-probabilities are summed, if they differ from the input tokens. Raises UserError
    for a name without tokens.
    """
    sequences = []  # of each name: pairs of input and target token
    for inputs, targets in zip(input_ids, target_ids or input_ids, strict=True):
        sequences.append(tuple(zip(inputs, targets, strict=True)))
    for number, sequence in enumerate(sequences):
        if not sequence:
            raise UserError(f"Class name number {number} has no tokens: the model's tokenizer drops it; rename it.")
    tokens, parent, depth = [(-1, -1)], [-1], [0]
    name_node = np.zeros(len(sequences), dtype=np.int64)
    path, previous = [0], ()
    # In sorted order, the sequences visit the nodes in preorder.
    for number in sorted(range(len(sequences)), key=lambda number: sequences[number]):
        sequence = sequences[number]
        shared = 0  # the length of the common prefix with the previous sequence
        while shared < min(len(sequence), len(previous)) and sequence[shared] == previous[shared]:
            shared += 1
        del path[shared + 1 :]
        for token in sequence[shared:]:
            tokens.append(token)
            parent.append(path[-1])
            depth.append(len(path))
            path.append(len(tokens) - 1)
        name_node[number] = path[-1]
        previous = sequence
    end = np.arange(1, len(tokens) + 1)
    for node in range(len(tokens) - 1, 0, -1):
        end[parent[node]] = max(end[parent[node]], end[node])
    token_array = np.array(tokens, dtype=np.int64)  # [nodes, 2]
    return LabelTrie(token_array[:, 0], token_array[:, 1], np.array(parent), np.array(depth), end, name_node)
