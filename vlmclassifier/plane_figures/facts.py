"""The facts of figures.py as questions and answers. {subject} stands for "the astroid" or "this figure"."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from vlmclassifier.plane_figures.figures import FIGURES, Figure


class Fact(NamedTuple):
    """One question about a class and its true answer."""

    kind: str  # questions of one kind have the same set of possible answers
    question: str  # contains {subject}
    answer: str


def with_article(noun: str) -> str:
    """Return `noun` with its indefinite article."""
    first_part = noun.split("-")[0]
    is_spelt_letter = first_part in ("H", "L")  # pronounced with a vowel: an L-tetromino
    starts_with_vowel = is_spelt_letter or first_part[0].lower() in "aeiou"
    return f"{'an' if starts_with_vowel else 'a'} {noun}"


def _number_text(value: float) -> str:
    return "infinitely many" if math.isinf(value) else str(int(value))


def _century_text(century: int) -> str:
    """Return the text of a century; negative numbers are BC."""
    number = abs(century)
    ending = "th"
    if number not in (11, 12, 13):
        ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"the {number}{ending} century{' BC' if century < 0 else ''}"


def facts_of(figure: Figure) -> Iterator[Fact]:
    """Yield every fact about one figure that is not None."""
    yield Fact("family", "What kind of figure is {subject}?", with_article(figure.family))
    if figure.closed is not None:
        yield Fact("closed", "Is {subject} closed or open?", "closed" if figure.closed else "open")
    number_questions = {
        "sides": "How many sides does {subject} have?",
        "cusps": "How many cusps does {subject} have?",
        "axes": "How many axes of symmetry does {subject} have?",
        "crossings": "At how many points does {subject} cross itself?",
        "degree": "What is the degree of {subject}?",
    }
    for kind, question in number_questions.items():
        value = getattr(figure, kind)
        if value is not None:
            yield Fact(kind, question, _number_text(value))
    if figure.algebraic is not None:
        yield Fact(
            "algebraic", "Is {subject} algebraic or transcendental?",
            "algebraic" if figure.algebraic else "transcendental",
        )  # fmt: skip
    if figure.dimension is not None:
        yield Fact("dimension", "What is the fractal dimension of {subject}?", f"{figure.dimension:.3g}")
    if figure.namesake is not None:
        yield Fact("namesake", "Who is {subject} named after?", figure.namesake)
    if figure.student is not None:
        yield Fact("student", "Who studied {subject}?", figure.student)
    if figure.century is not None:
        question = "In which century did " + figure.student + " study {subject}?"
        yield Fact("century", question, _century_text(figure.century))


def figure_facts() -> dict[str, list[Fact]]:
    """Return the facts of every class."""
    return {name: list(facts_of(figure)) for name, figure in FIGURES.items()}
