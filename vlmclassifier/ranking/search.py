"""Exact best-first search for the k best names: only the nodes of the trie that can still lead to one are run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmclassifier.ranking.trie import LabelTrie
from vlmclassifier.scoring.guidance import Scoring, best

BEST_NODES = 32  # per image and round, if a batch has several images
SUBTREE_NODES = 150  # per round, if a batch has one image: whole subtrees, because a round costs more than its nodes


class Bounds:
    """The best score that a name below a node can reach, given the summed log-probability of the node.

    Log-probabilities are never above 0, so the sum of a name is at most that of a node on its path. The mean and the
    guidance also depend on the length and the prior of the name: for each node and each length, the largest constant
    (1 - t) * prior of the names below the node is stored.
    """

    def __init__(self, trie: LabelTrie, scoring: Scoring) -> None:
        self.t = scoring.t
        constants = scoring.constant(len(trie.name_node))  # [names]
        if scoring.per_token:
            self.lengths = np.unique(trie.lengths).astype(np.float64)  # [lengths]
            column = np.searchsorted(self.lengths, trie.lengths)  # [names]
        else:  # one column for all names
            self.lengths = np.ones(1)
            column = np.zeros_like(trie.lengths)
        self.largest_constant = np.full((trie.size, len(self.lengths)), -np.inf)  # [nodes, lengths]
        for name, node in enumerate(trie.name_node):
            path = [0, *trie.ancestors(node)]
            self.largest_constant[path, column[name]] = np.maximum(
                self.largest_constant[path, column[name]], constants[name]
            )

    def __call__(self, nodes: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """The bounds of nodes with these summed log-probabilities; all [nodes].

        The operations are those of a score, in the same order, so that both are rounded in the same way.
        """
        return ((self.t * sums[:, None] + self.largest_constant[nodes]) / self.lengths).max(axis=1)


@dataclass
class SearchResult:
    """The k best names of one image, and the cost of the search."""

    names: np.ndarray  # [k] indices of the names, best first; of equal scores the first index comes first
    scores: np.ndarray  # [k]
    nodes: int  # nodes that were run, in addition to the prompt
    rounds: int  # forward passes


class Frontier:
    """The state of the search for one image."""

    def __init__(self, trie: LabelTrie, scoring: Scoring, bounds: Bounds, k: int) -> None:
        self.trie, self.scoring, self.bounds = trie, scoring, bounds
        self.k = min(k, len(trie.name_node))
        self.is_inner = np.zeros(trie.size, dtype=bool)
        self.is_inner[trie.inner] = True
        self.sums = np.full(trie.size, -np.inf)  # [nodes] summed log-probabilities; -inf: not known yet
        self.sums[0] = 0.0
        self.is_open = np.zeros(trie.size, dtype=bool)  # [nodes] inner nodes with a known sum that were not run yet
        self.scores = np.full(len(trie.name_node), -np.inf)  # [names]
        self.nodes = self.rounds = 0

    def add_log_probs(self, nodes: np.ndarray, log_probs: np.ndarray) -> None:
        """Add the log-probabilities [edges] of all children of `nodes`, in the order of `trie.children`."""
        children, parent_index = self.trie.children(nodes)  # both [edges]
        depth = self.trie.depth[children]
        for level in np.unique(depth):  # from the top, because a node may have run in the same round as its parent
            edges = depth == level
            self.sums[children[edges]] = self.sums[nodes[parent_index[edges]]] + log_probs[edges]
        self.is_open[children[self.is_inner[children]]] = True
        self.is_open[nodes] = False
        name_sums = self.sums[self.trie.name_node].astype(np.float32)  # [names], rounded as in a full ranking
        with np.errstate(invalid="ignore"):  # 0 * -inf, if t is 0 and a sum is not known
            scores = self.scoring(name_sums, self.trie.lengths)
        self.scores = np.where(np.isneginf(name_sums), -np.inf, scores)

    def next_nodes(self, whole_subtrees: bool) -> np.ndarray:
        """The nodes [nodes] to run in the next round, in preorder; empty when the k best names are certain.

        A node whose bound equals the k-th best score is run too: a name below it may have the same score and a smaller
        index.
        """
        nodes = np.flatnonzero(self.is_open)
        if not len(nodes):
            return nodes
        # Rounding is monotonic, so the rounded sum of a name is never above the rounded sum of a node on its path.
        bounds = self.bounds(nodes, self.sums[nodes].astype(np.float32).astype(np.float64))
        threshold = np.partition(self.scores, -self.k)[-self.k]
        is_relevant = bounds >= threshold
        nodes = nodes[is_relevant][np.argsort(-bounds[is_relevant], kind="stable")]
        selected = self._best_subtrees(nodes) if whole_subtrees else nodes[:BEST_NODES]
        if len(selected):
            self.nodes += len(selected)
            self.rounds += 1
        return np.sort(selected)

    def _best_subtrees(self, nodes: np.ndarray) -> np.ndarray:
        """The inner nodes of the first subtrees of `nodes`, as many as fit into a round."""
        if not len(nodes):
            return nodes
        ranges = [self._inner_range(node) for node in nodes]
        sizes = np.array([end - start for start, end in ranges])
        count = max(1, int(np.searchsorted(np.cumsum(sizes), SUBTREE_NODES, side="right")))
        selected = np.concatenate([self.trie.inner[start:end] for start, end in ranges[:count]])
        if len(selected) > SUBTREE_NODES:  # a single subtree is larger than a round: run only its top node
            return nodes[:1]
        return selected

    def _inner_range(self, node: int) -> tuple[int, int]:
        """The range of the inner nodes of a subtree in `trie.inner`."""
        start, end = np.searchsorted(self.trie.inner, [node, self.trie.end[node]])
        return int(start), int(end)

    def result(self) -> SearchResult:
        """The result of the search, once `next_nodes` is empty."""
        names = best(self.scores, self.k)
        return SearchResult(names, self.scores[names], self.nodes, self.rounds)


def search(
    trie: LabelTrie,
    scoring: Scoring,
    k: int,
    root_log_probs: np.ndarray,
    run_nodes: Callable[[list[int], list[np.ndarray]], Sequence[np.ndarray]],
    whole_subtrees: bool | None = None,
) -> list[SearchResult]:
    """The k best names of every image of a batch: the same names in the same order as in a full ranking.

    `root_log_probs`: log-probabilities [images, edges] of the children of the root. `run_nodes(images, nodes)`: runs
    nodes of some images and returns, for each image, the log-probabilities [edges] of the children of its nodes; an
    image takes part in every round until its search ends. `whole_subtrees`: whether a round runs whole subtrees; by
    default only for a batch of one image.
    """
    bounds = Bounds(trie, scoring)
    frontiers = [Frontier(trie, scoring, bounds, k) for _ in root_log_probs]
    if whole_subtrees is None:
        whole_subtrees = len(frontiers) == 1
    for frontier, log_probs in zip(frontiers, root_log_probs, strict=True):
        frontier.add_log_probs(np.zeros(1, dtype=int), log_probs)
    while True:
        images, nodes = [], []
        for image, frontier in enumerate(frontiers):
            next_nodes = frontier.next_nodes(whole_subtrees)
            if len(next_nodes):
                images.append(image)
                nodes.append(next_nodes)
        if not images:
            return [frontier.result() for frontier in frontiers]
        for image, image_nodes, log_probs in zip(images, nodes, run_nodes(images, nodes), strict=True):
            frontiers[image].add_log_probs(image_nodes, log_probs)
