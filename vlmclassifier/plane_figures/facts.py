"""The fact table in words: questions and their answers, with {subject} in place of "the astroid" or "this figure"."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from vlmclassifier.plane_figures.figures import FIGURES, Figure


class Fact(NamedTuple):
    """One question about a class and its true answer; `kind` groups the questions that share their answers."""

    kind: str
    question: str  # with {subject}
    answer: str


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    spoken = noun.split("-")[0]
    vowel = spoken in ("H", "L") or spoken[0].lower() in "aeiou"  # letters read by their names: an L-tetromino
    return f"{'an' if vowel else 'a'} {noun}"


def _number(value: float) -> str:
    return "infinitely many" if math.isinf(value) else str(int(value))


def _century(value: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(abs(value) % 10 if abs(value) not in (11, 12, 13) else 0, "th")
    return f"the {abs(value)}{ending} century{' BC' if value < 0 else ''}"


def facts_of(figure: Figure) -> Iterator[Fact]:
    """Every fact of the table about one figure; those that are None are left out."""
    yield Fact("family", "What kind of figure is {subject}?", article(figure.family))
    if figure.closed is not None:
        yield Fact("closed", "Is {subject} closed or open?", "closed" if figure.closed else "open")
    numbers = {
        "sides": "How many sides does {subject} have?",
        "cusps": "How many cusps does {subject} have?",
        "axes": "How many axes of symmetry does {subject} have?",
        "crossings": "At how many points does {subject} cross itself?",
        "degree": "What is the degree of {subject}?",
    }
    for kind, question in numbers.items():
        if getattr(figure, kind) is not None:
            yield Fact(kind, question, _number(getattr(figure, kind)))
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
        yield Fact("century", "In which century did " + figure.student + " study {subject}?", _century(figure.century))


def figure_facts() -> dict[str, list[Fact]]:
    """The facts of every class."""
    return {name: list(facts_of(figure)) for name, figure in FIGURES.items()}
