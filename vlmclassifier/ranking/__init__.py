"""Ranking class names by log p(name | image, prompt), exactly, all in one pass (paper section 2).

`Ranker` imports torch when first used; trie, scores and search are numpy alone.
"""

from typing import TYPE_CHECKING, Any

from vlmclassifier.ranking.names import NameTokens, name_tokens
from vlmclassifier.ranking.scores import GRID, Scoring, best, choose, curve, held_out, ranks
from vlmclassifier.ranking.search import Found, search
from vlmclassifier.ranking.trie import LabelTrie, build_trie

if TYPE_CHECKING:
    from vlmclassifier.ranking.ranker import Ranker

__all__ = [
    "GRID", "Found", "LabelTrie", "NameTokens", "Ranker", "Scoring", "best", "build_trie", "choose", "curve",
    "held_out", "name_tokens", "ranks", "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name != "Ranker":
        raise AttributeError(f"module 'vlmclassifier.ranking' has no attribute {name!r}")
    from vlmclassifier.ranking.ranker import Ranker

    return Ranker
