"""Sentences by nltk's untrained Punkt splitter, then lower-case Penn-Treebank tokens (paper, section 3.3)."""

from functools import cache
from typing import Any

VERSION = 1  # raise it when the tokens of a text change: stored ones are then computed anew


@cache
def _tools() -> tuple[Any, Any]:
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    return PunktSentenceTokenizer(), NLTKWordTokenizer()


def tokenise(text: str) -> list[list[str]]:
    """The tokens of every sentence of a text."""
    splitter, words = _tools()
    sentences = [words.tokenize(sentence.lower()) for sentence in splitter.tokenize(text)]
    return [tokens for tokens in sentences if tokens]


def name_tokens(name: str) -> list[str]:
    """The tokens of a class name, as they stand in a sentence."""
    return _tools()[1].tokenize(name.lower())


def joined(tokens: list[str]) -> str:
    """Tokens with a space around each, so that a search for " name " finds whole tokens. No token has white space."""
    return f" {' '.join(tokens)} "
