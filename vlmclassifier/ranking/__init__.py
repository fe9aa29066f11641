"""Ranking class names by log p(name | image, prompt), exactly, all in one pass (paper section 2)."""

from vlmclassifier.ranking.names import NameTokens, name_tokens
from vlmclassifier.ranking.ranker import Ranker
from vlmclassifier.ranking.scores import GRID, Scoring, best, choose, curve, held_out, ranks
from vlmclassifier.ranking.search import Found, search
from vlmclassifier.ranking.trie import LabelTrie, build_trie

__all__ = [
    "GRID", "Found", "LabelTrie", "NameTokens", "Ranker", "Scoring", "best", "build_trie", "choose", "curve",
    "held_out", "name_tokens", "ranks", "search",
]  # fmt: skip
