"""One Aho-Corasick automaton for the names of all class lists: which sentences name which class, in which form."""

import re
from collections.abc import Mapping, Sequence
from enum import IntFlag
from itertools import chain

import numpy as np

from vlmclassifier.counting.tokens import joined, name_tokens
from vlmclassifier.records import UserError
from vlmclassifier.scoring.mentions import plural


class Form(IntFlag):
    """In which form a sentence names a class; one sentence may have several."""

    ALONE = 1  # the name itself, not within a longer name of its list
    INSIDE = 2  # the name itself within a longer one: "crane" in "whooping crane"
    PLURAL = 4  # the plural of the last word
    HYPHEN = 8  # written with hyphens, with spaces or as one word instead
    SYNONYM = 16  # another lemma of the class, where there are any
    LAST_WORD = 32  # the last word of the name alone; for the audit, never counted
    REFERENCE = 64  # the name itself with a token before and behind it, which the reference's code needs


NAMED = Form.ALONE | Form.INSIDE


class ClassMatcher:
    """Finds the classes of several lists in tokenised sentences.

    `lists`: names by list. `synonyms`: further names of the classes of a list, in the same order. Raises UserError for
    an empty list and for a name without tokens.
    """

    def __init__(
        self, lists: Mapping[str, Sequence[str]], synonyms: Mapping[str, Sequence[Sequence[str]]] | None = None
    ) -> None:
        from ahocorasick_rs import AhoCorasick

        self.arguments = (lists, synonyms)  # to make it again in another process
        self.classes = [(key, name) for key, names in lists.items() for name in dict.fromkeys(names)]
        if empty := [key for key, names in lists.items() if not names]:
            raise UserError(f"The class list {empty[0]} is empty: give it names.")
        further: dict[tuple[str, str], list[str]] = {}
        for key, of_classes in (synonyms or {}).items():
            for name, lemmas in zip(lists[key], of_classes, strict=True):
                further.setdefault((key, name), []).extend(lemmas)
        own = {key: {tuple(name_tokens(name)) for name in names} for key, names in lists.items()}
        patterns: dict[str, list[tuple[int, int]]] = {}
        for number, (key, name) in enumerate(self.classes):
            for form, words in name_forms(name, further.get((key, name), ())):
                if form in (Form.PLURAL, Form.HYPHEN, Form.SYNONYM) and tuple(words) in own[key]:
                    continue  # a class of that name has precedence
                patterns.setdefault(joined(words), []).append((number, form))
        self._automaton = AhoCorasick(list(patterns))
        entries = [(pattern, *entry) for pattern, found in enumerate(patterns.values()) for entry in found]
        table = np.array(entries, dtype=np.int64).reshape(-1, 3)
        self._first = np.searchsorted(table[:, 0], np.arange(len(patterns) + 1))  # entries of each pattern
        self._class, self._form = table[:, 1], table[:, 2]
        keys = list(lists)
        self._list = np.array([keys.index(key) for key, _ in self.classes])

    def match(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which sentences name which class: sentence, class and Form [pairs], sorted, each pair once.

        `sentences`: of `tokens.joined`.
        """
        text = "\n".join(sentences)
        matches = self._automaton.find_matches_as_indexes(text, overlapping=True)  # (pattern, start, end) each
        found = np.fromiter(chain.from_iterable(matches), dtype=np.int64, count=3 * len(matches)).reshape(-1, 3)
        lengths = np.fromiter((len(sentence) for sentence in sentences), dtype=np.int64, count=len(sentences))
        starts = np.cumsum(lengths + 1) - lengths - 1  # [sentences] first character of each
        counts = self._first[found[:, 0] + 1] - self._first[found[:, 0]]  # classes of each match
        row = np.repeat(np.arange(len(found)), counts)  # [entries] match
        offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        entry = self._first[found[row, 0]] + offset
        number, form = self._class[entry], self._form[entry]
        begin, end = found[row, 1], found[row, 2]
        sentence = np.searchsorted(starts, begin, side="right") - 1
        is_name = form == Form.ALONE
        form = np.where(is_name & self._inside(number, begin, end, is_name), Form.INSIDE, form)
        within = (begin > starts[sentence]) & (end < starts[sentence] + lengths[sentence])
        form = np.where(is_name & within, form | Form.REFERENCE, form)
        pair = sentence * len(self.classes) + number
        order = np.argsort(pair, kind="stable")
        pairs, first = np.unique(pair[order], return_index=True)
        masks = np.bitwise_or.reduceat(form[order], first) if len(pairs) else form[:0]
        return pairs // len(self.classes), pairs % len(self.classes), masks

    def _inside(self, number: np.ndarray, begin: np.ndarray, end: np.ndarray, is_name: np.ndarray) -> np.ndarray:
        """Which matches of names lie within a longer one of the same list: bool [entries]."""
        inside = np.zeros(len(number), dtype=bool)
        for which in np.unique(self._list[number]):
            rows = np.flatnonzero(is_name & (self._list[number] == which))
            spans, place = np.unique(np.stack([begin[rows], -end[rows]], axis=1), axis=0, return_inverse=True)
            reached = np.maximum.accumulate(-spans[:, 1])  # the longest of equal beginnings comes first
            longer = np.zeros(len(spans), dtype=bool)
            longer[1:] = reached[:-1] >= -spans[1:, 1]
            inside[rows] = longer[place.ravel()]
        return inside


def name_forms(name: str, synonyms: Sequence[str] = ()) -> list[tuple[Form, list[str]]]:
    """The forms of a name as tokens, each spelling once, the name itself first. Raises UserError for a name of none."""
    words = name_tokens(name)
    if not words:
        raise UserError(f"The class {name!r} has no words to count: remove it from the class list.")
    variants = [(Form.ALONE, name), (Form.PLURAL, plural(name.lower()))]
    variants += [(Form.HYPHEN, re.sub(r"[\s-]+", between, name)) for between in ("-", " ", "")]
    variants += [(Form.SYNONYM, lemma) for lemma in synonyms]
    variants.append((Form.LAST_WORD, re.split(r"[\s-]+", name.strip())[-1]))
    forms: dict[tuple[str, ...], Form] = {}
    for form, spelling in variants:
        if tokens := name_tokens(spelling):
            forms.setdefault(tuple(tokens), form)
    return [(form, list(tokens)) for tokens, form in forms.items()]


def reference_finds(name: str) -> bool:
    """Whether the reference's code looks its counts up: they are stored under the tokens, with spaces between them."""
    return " ".join(name_tokens(name)) == name.lower()
