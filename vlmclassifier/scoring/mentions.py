"""Which class names an answer mentions: whole words, whatever the accents, case and punctuation, in the plural too.

All names are searched in one pass over an answer by an Aho-Corasick automaton.
"""

import re
import unicodedata
from collections.abc import Collection, Sequence

import regex

NOT_WORDS = re.compile(r"[\W_]+")
NO_LETTERS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # a vowel sign is part of its word
ACCENTS = regex.compile(
    r"(?<=[\p{Latin}\p{Greek}\p{Cyrillic}]\p{Mn}*)\p{Mn}"
)  # in other scripts they distinguish words
INVISIBLE = regex.compile(r"\p{Cf}")  # soft hyphens, joiners
WITHOUT_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]\p{M}*")  # each character counts as a word

Mention = tuple[int, int, frozenset[str]]  # start and end in the plain words, and the names with this spelling


def plain_words(text: str) -> str:
    """Lower case, without accents, compatibility forms unified, anything but letters and digits a single space."""
    if text.isascii():
        return NOT_WORDS.sub(" ", text.casefold()).strip()
    text = ACCENTS.sub("", unicodedata.normalize("NFKD", INVISIBLE.sub("", text)))
    text = unicodedata.normalize("NFC", text.casefold())
    return NO_LETTERS.sub(" ", WITHOUT_SPACES.sub(r" \g<0> ", text)).strip()


def plural(words: str) -> str:
    """The simple plural of a name's last word: cats, boxes, berries."""
    if re.search(r"[^aeiou]y$", words):
        return words[:-1] + "ies"
    return words + ("es" if re.search(r"(s|x|z|ch|sh)$", words) else "s")


class Mentions:
    """Finds the class names of a list in answers."""

    def __init__(self, names: Sequence[str]) -> None:
        from ahocorasick_rs import AhoCorasick

        forms: dict[str, set[str]] = {}
        for name in dict.fromkeys(names):
            forms.setdefault(plain_words(name), set()).add(name)
        own = set(forms)
        for words in own:
            if words and plural(words) not in own:  # a class of that name has precedence
                forms.setdefault(plural(words), set()).update(forms[words])
        forms.pop("", None)  # a name of punctuation only is never mentioned
        self._names = [frozenset(names) for names in forms.values()]
        self._automaton = AhoCorasick([f" {words} " for words in forms])  # a space at both ends: whole words

    def find(self, text: str) -> list[Mention]:
        """(start, end, names) of every mention in the answer's plain words; several names may share a spelling."""
        found = self._automaton.find_matches_as_indexes(f" {plain_words(text)} ", overlapping=True)
        return [(start, end, self._names[which]) for which, start, end in found]


def all_named(found: Sequence[Mention]) -> set[str]:
    """Every name that is mentioned, also within a longer one."""
    return {name for _, _, names in found for name in names}


def longest_mentions(found: Sequence[Mention], among: Collection[str] | None = None) -> list[frozenset[str]]:
    """The mentions, in the order of the answer, that are part of no longer one: of "great white shark" not "shark".

    `among`: only these names count, such as the candidates of a list.
    """
    if among is not None:
        allowed = frozenset(among)
        found = [(start, end, names & allowed) for start, end, names in found if names & allowed]
    by_start = sorted((start, -end, names) for start, end, names in found)  # the longer of two first
    result, reached = [], 0
    for _, negative_end, names in by_start:
        if -negative_end > reached:
            result.append(names)
            reached = -negative_end
    return result
