"""What option an answer in words chooses: the paper's rule (that of MMMU), and a strict one."""

import random
import re
import string
from collections.abc import Sequence

from vlmclassifier.questions.items import LETTERS

PUNCTUATION = ",.!?;:'"
LONG = 5  # words, above which the text of an option is searched in an answer
STATED = re.compile(r"\b(?:answer|option|choice)(?: is|:)?[\s:]*\(?([A-H])\b", re.IGNORECASE)
LEADING = re.compile(r"\(?([A-H])(?:\)|\.|:|\b)(?:\s|$)")


def parse_paper(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer chooses by the paper's rule (experiments.md, section 6); None where it finds none.

    Punctuation at both ends aside: letters in brackets; else letters that stand alone between spaces; else, in an
    answer of more than five words, options whose text occurs in it. Of several the one whose last occurrence is latest.
    """
    text = f" {answer.strip().strip(PUNCTUATION)} "
    letters = LETTERS[: len(options)]
    for form in ("({})", " {} "):
        places = {place: text.rfind(form.format(letter)) for place, letter in enumerate(letters)}
        found = [place for place in places if places[place] >= 0]
        if found:
            return max(found, key=places.__getitem__)
    if len(text.split()) <= LONG:
        return None
    places = {place: text.lower().rfind(option.lower()) for place, option in enumerate(options)}
    found = [place for place in places if places[place] >= 0]
    return max(found, key=places.__getitem__, default=None)


def parse_strict(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer names beyond doubt; None for every other answer.

    The answer begins with a letter ("B", "(B)", "B. text"), states one ("the answer is B"), or is an option's text;
    where several are stated or begun with, they are the same one.
    """
    letters, text = LETTERS[: len(options)], answer.strip()
    stated = {match.upper() for match in STATED.findall(text)} & set(letters)
    if len(stated) == 1:
        return letters.index(stated.pop())
    if stated:
        return None
    plain = _plain(text)
    equal = [place for place, option in enumerate(options) if _plain(option) == plain]
    if len(equal) == 1:
        return equal[0]
    begun = LEADING.match(text)
    if begun is None or begun[1] not in letters:
        return None
    place = letters.index(begun[1])
    rest = _plain(text[begun.end() :])
    # "A rose" begins with a word; "A. rose", "A" and "A rose" where that is option A choose.
    is_marked = text[begun.start() : begun.end()].strip() != begun[1]
    return place if is_marked or not rest or rest == _plain(options[place]) else None


def contains_option(answer: str, options: Sequence[str], right: int) -> bool:
    """Whether a free answer, without options in its question, contains the right option's text and no other's.

    An option that is a part of the right one does not count as another.
    """
    text = f" {_plain(answer)} "
    others = [f" {_plain(option)} " for place, option in enumerate(options) if place != right]
    own = f" {_plain(options[right])} "
    return own in text and not any(other in text.replace(own, "  ") for other in others if other not in own)


def random_option(seed: int, question_id: str, count: int) -> int:
    """A random guess, drawn from (seed, question) alone."""
    return random.Random(f"guess:{seed}:{question_id}").randrange(count)


def _plain(text: str) -> str:
    """Lower case, without punctuation at the ends of words, single spaces."""
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    return " ".join(word for word in words if word)
