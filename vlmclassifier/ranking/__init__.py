"""Exact ranking of class names by log p(name | image, prompt), all in one pass (paper, section 3.1).

`Ranker` imports torch when it is first used; the trie, the names and the search need only numpy.
"""

from typing import TYPE_CHECKING, Any

from vlmclassifier.ranking.names import NameTokens, name_tokens
from vlmclassifier.ranking.search import SearchResult, search
from vlmclassifier.ranking.trie import LabelTrie, build_trie

if TYPE_CHECKING:
    from vlmclassifier.ranking.probabilities import rank_names
    from vlmclassifier.ranking.ranker import Ranker

__all__ = ["LabelTrie", "NameTokens", "Ranker", "SearchResult", "build_trie", "name_tokens", "rank_names", "search"]


def __getattr__(name: str) -> Any:
    if name not in ("Ranker", "rank_names"):
        raise AttributeError(f"module 'vlmclassifier.ranking' has no attribute {name!r}")
    from vlmclassifier.ranking import probabilities, ranker

    return ranker.Ranker if name == "Ranker" else probabilities.rank_names
