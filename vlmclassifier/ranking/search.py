"""Exact best-first search for the k best names: of the trie only what can still reach them is run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmclassifier.ranking.scores import Scoring, best
from vlmclassifier.ranking.trie import LabelTrie

BEST_NODES = 32  # of each picture in a round, where a batch fills the machine
SUBTREE_NODES = 150  # of a single picture in a round: whole subtrees, since rounds cost more than nodes


class Bounds:
    """The best score that a name below a node can reach, from the node's summed log-probability alone.

    Log-probabilities are never above 0, so a name's sum is at most its node's. For the mean and for guidance the names
    below are told apart by their lengths: of each length the largest constant (1 - t) * prior counts.
    """

    def __init__(self, trie: LabelTrie, scoring: Scoring) -> None:
        self.t = scoring.t
        constant = scoring.constant(len(trie.name_node))
        self.lengths = np.unique(trie.lengths).astype(np.float64) if scoring.per_token else np.ones(1)
        column = np.searchsorted(self.lengths, trie.lengths) if scoring.per_token else np.zeros_like(trie.lengths)
        self.most = np.full((trie.size, len(self.lengths)), -np.inf)  # [nodes, lengths]
        for name, node in enumerate(trie.name_node):
            above = [0, *trie.ancestors(node)]
            self.most[above, column[name]] = np.maximum(self.most[above, column[name]], constant[name])

    def __call__(self, nodes: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Bounds [nodes] of nodes with these sums [nodes]; the operations are those of a score, in the same order."""
        return ((self.t * sums[:, None] + self.most[nodes]) / self.lengths).max(axis=1)


@dataclass
class Found:
    """What a search found of one picture, and what it cost."""

    names: np.ndarray  # [k] places of the names, best first; of equal ones the first comes first
    scores: np.ndarray  # [k]
    nodes: int  # run, beside the prompt
    rounds: int


class Frontier:
    """The state of one picture's search."""

    def __init__(self, trie: LabelTrie, scoring: Scoring, bounds: Bounds, k: int) -> None:
        self.trie, self.scoring, self.bounds = trie, scoring, bounds
        self.k = min(k, len(trie.name_node))
        self.is_inner = np.zeros(trie.size, dtype=bool)
        self.is_inner[trie.inner] = True
        self.sums = np.full(trie.size, -np.inf)  # -inf: not known yet
        self.sums[0] = 0.0
        self.open = np.zeros(trie.size, dtype=bool)  # known inner nodes that have not run
        self.scores = np.full(len(trie.name_node), -np.inf)
        self.nodes = self.rounds = 0

    def learn(self, nodes: np.ndarray, log_probs: np.ndarray) -> None:
        """Take in the log-probabilities [edges] of all children of `nodes`, in the order of `trie.children`."""
        children, place = self.trie.children(nodes)
        depth = self.trie.depth[children]
        for level in np.unique(depth):  # a node may have run together with its parent
            at = depth == level
            self.sums[children[at]] = self.sums[nodes[place[at]]] + log_probs[at]
        self.open[children[self.is_inner[children]]] = True
        self.open[nodes] = False
        known = self.sums[self.trie.name_node].astype(np.float32)  # as the full ranking stores them
        with np.errstate(invalid="ignore"):  # 0 * -inf, where t is 0 and a sum is not known
            scores = self.scoring(known, self.trie.lengths)
        self.scores = np.where(np.isneginf(known), -np.inf, scores)

    def take(self, subtrees: bool) -> np.ndarray:
        """The nodes of the next round in preorder; none when the k best names are certain.

        A node whose bound equals the k-th best score is run, too: a name below it may be equal and come first.
        """
        nodes = np.flatnonzero(self.open)
        if not len(nodes):
            return nodes
        # Rounding keeps the order: a name's rounded sum is never above its node's.
        bounds = self.bounds(nodes, self.sums[nodes].astype(np.float32).astype(np.float64))
        threshold = np.partition(self.scores, -self.k)[-self.k]
        able = bounds >= threshold
        nodes = nodes[able][np.argsort(-bounds[able], kind="stable")]
        if not subtrees:
            taken = nodes[:BEST_NODES]
        else:
            sizes = np.array([self._inner_below(node) for node in nodes], dtype=int)
            count = max(1, int(np.searchsorted(np.cumsum(sizes), SUBTREE_NODES, side="right")))
            below = [self.trie.inner[slice(*self._range(node))] for node in nodes[:count]]
            taken = np.concatenate(below) if below else nodes
            if len(taken) > SUBTREE_NODES:  # one subtree is larger than a round: its own top alone
                taken = nodes[:1]
        self.nodes += len(taken)
        self.rounds += bool(len(taken))
        return np.sort(taken)

    def _range(self, node: int) -> tuple[int, int]:
        start, end = np.searchsorted(self.trie.inner, [node, self.trie.end[node]])
        return int(start), int(end)

    def _inner_below(self, node: int) -> int:
        start, end = self._range(node)
        return end - start

    def found(self) -> Found:
        """The result, when `take` has nothing left."""
        names = best(self.scores, self.k)
        return Found(names, self.scores[names], self.nodes, self.rounds)


def search(
    trie: LabelTrie,
    scoring: Scoring,
    k: int,
    first: np.ndarray,
    run: Callable[[list[int], list[np.ndarray]], Sequence[np.ndarray]],
    subtrees: bool | None = None,
) -> list[Found]:
    """The k best names of every picture of a batch, the same as those of the full ranking in the same order.

    `first`: log-probabilities [pictures, edges] of the root's children. `run(pictures, nodes)` runs some nodes of some
    pictures (all of them in every round until a picture is done) and returns, for each, the log-probabilities of
    their children. `subtrees`: the policy of a round; without it whole subtrees for a single picture.
    """
    bounds = Bounds(trie, scoring)
    frontiers = [Frontier(trie, scoring, bounds, k) for _ in first]
    subtrees = len(frontiers) == 1 if subtrees is None else subtrees
    for frontier, log_probs in zip(frontiers, first, strict=True):
        frontier.learn(np.zeros(1, dtype=int), log_probs)
    while True:
        taken = [(number, frontier.take(subtrees)) for number, frontier in enumerate(frontiers) if frontier.open.any()]
        taken = [(number, nodes) for number, nodes in taken if len(nodes)]
        if not taken:
            return [frontier.found() for frontier in frontiers]
        pictures, nodes = [number for number, _ in taken], [nodes for _, nodes in taken]
        for number, some, log_probs in zip(pictures, nodes, run(pictures, nodes), strict=True):
            frontiers[number].learn(some, log_probs)
