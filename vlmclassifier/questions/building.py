"""The construction of ImageWikiQA without its models: drafts, shuffles, pairing with images, audit (section 4)."""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmclassifier.questions.items import LETTERS, ChoiceQuestion, make_question, question_text

SHUFFLE_SEED = 1234  # of the choices, as in the paper
OPTIONS = 4
WRITE = """Here is the Wikipedia article about {name}:

{article}

Write five multiple-choice questions about facts of this article. Say "this object" instead of "{name}", and never write
the name, so that only someone who knows what the object is can answer. Each question has four choices of similar
length, of which exactly one is right. Answer with JSON: {{"questions": [{{"question": "...", "choices": ["...", "...",
"...", "..."], "answer": 0, "reference": "the sentence of the article that holds the answer"}}]}}, where "answer" is the
index of the right choice."""
WITHOUT_NAME = "\nWe do not know what the object is: guess. Answer with the letter alone."
WITH_NAME = "\nAnswer with the letter alone."
SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["questions"],
    "properties": {"questions": {"type": "array", "items": {
        "type": "object", "additionalProperties": False, "required": ["question", "choices", "answer", "reference"],
        "properties": {"question": {"type": "string"}, "choices": {"type": "array", "items": {"type": "string"}},
                       "answer": {"type": "integer"}, "reference": {"type": "string"}},
    }}},
}  # fmt: skip


@dataclass(frozen=True)
class Draft:
    """A question about a class, not yet about an image."""

    class_name: str
    question: str
    options: tuple[str, ...]
    answer: int
    reference: str

    @property
    def key(self) -> str:
        """What identifies it between stages."""
        return f"{self.class_name}\n{self.question}"

    def text(self, end: str = "") -> str:
        """Question, options, and the end of a filter's prompt."""
        return question_text(self.question, self.options) + end


class DraftError(ValueError):
    """Why a reply holds no questions that can be used."""


def parse_drafts(reply: str, class_name: str) -> list[Draft]:
    """The questions of a reply, every field checked. Raises DraftError with the reason: the model is asked again."""
    text = reply.strip()
    if fenced := re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL):
        text = fenced[1]
    try:
        rows = json.loads(text)["questions"]
    except (ValueError, KeyError, TypeError) as error:
        raise DraftError(f"no JSON with questions ({type(error).__name__})") from None
    if not isinstance(rows, list) or not rows:
        raise DraftError("an empty list of questions")
    return [_parse_draft(row, class_name, number) for number, row in enumerate(rows, start=1)]


def _parse_draft(row: Any, class_name: str, number: int) -> Draft:
    if not isinstance(row, dict):
        raise DraftError(f"question {number} is no object")
    question, options, answer, reference = (row.get(key) for key in ("question", "choices", "answer", "reference"))
    if not isinstance(question, str) or not question.strip() or "\n" in question.strip():
        raise DraftError(f"question {number} has no text of one line")
    if not isinstance(options, list) or len(options) != OPTIONS:
        raise DraftError(f"question {number} does not have {OPTIONS} choices")
    if not all(isinstance(option, str) and option.strip() and "\n" not in option.strip() for option in options):
        raise DraftError(f"question {number} has a choice without a text of one line")
    options = tuple(option.strip() for option in options)
    if len({option.lower() for option in options}) < OPTIONS:
        raise DraftError(f"question {number} has the same choice twice")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < OPTIONS:
        raise DraftError(f"question {number} has no index of a choice as its answer")
    if not isinstance(reference, str) or not reference.strip():
        raise DraftError(f"question {number} has no reference")
    if leaks("\n".join((question, *options)), class_name):
        raise DraftError(f"question {number} or a choice contains the class name")
    if not re.search(r"\b(this|these) objects?\b", question, re.IGNORECASE):
        raise DraftError(f'question {number} does not say "this object"')
    return Draft(class_name, question.strip(), options, answer, reference.strip())


def leaks(text: str, class_name: str) -> bool:
    """Whether a text contains the class name as whole words."""
    return re.search(rf"(?<!\w){re.escape(class_name)}(?!\w)", text, re.IGNORECASE) is not None


def shuffled(draft: Draft, seed: int, stage: str) -> Draft:
    """The same question with its choices in another order, drawn from (seed, stage, question) alone."""
    order = list(range(len(draft.options)))
    random.Random(f"{stage}:{seed}:{draft.key}").shuffle(order)
    return replace(draft, options=tuple(draft.options[place] for place in order), answer=order.index(draft.answer))


def pair_with_images(
    drafts: Sequence[Draft], images: Mapping[str, Sequence[str]], per_question: int, seed: int
) -> list[ChoiceQuestion]:
    """Each question with at most `per_question` images of its class, drawn from (seed, question) alone."""
    found = []
    for draft in drafts:
        own = list(images.get(draft.class_name, ()))
        chosen = random.Random(f"images:{seed}:{draft.key}").sample(own, min(per_question, len(own)))
        found += [make_question(image, draft.question, draft.options, draft.answer, draft.class_name, draft.reference)
                  for image in chosen]  # fmt: skip
    return found


def select(questions: Sequence[ChoiceQuestion], count: int | None, seed: int) -> list[ChoiceQuestion]:
    """At most `count` rows, drawn by the seed, in the order of the draw."""
    order = sorted(questions, key=lambda question: random.Random(f"select:{seed}:{question.id}").random())
    return order[:count]


def audit(questions: Sequence[ChoiceQuestion]) -> dict[str, Any]:
    """What makes questions easy or doubtful without the image: counts and shares in percent.

    longest, shortest option: the accuracy of always choosing it. class name in the text: rows.
    """
    letters = Counter(question.letter for question in questions)
    n = len(questions)

    def share(right: int) -> float:
        return round(100 * right / n, 2)

    def chosen_right(pick: Any) -> int:
        return sum(pick(question) == question.answer for question in questions)

    def longest(question: ChoiceQuestion) -> int:
        return max(range(len(question.options)), key=lambda place: len(question.options[place]))

    def shortest(question: ChoiceQuestion) -> int:
        return min(range(len(question.options)), key=lambda place: len(question.options[place]))

    texts = Counter(question.question for question in questions)
    return {
        "rows": n, "different questions": len(texts), "images": len({question.image for question in questions}),
        "classes": len({question.class_name for question in questions}),
        "rows per question, most": max(texts.values()),
        "letters": {letter: letters[letter] for letter in LETTERS if letters[letter]},
        "most frequent letter": share(max(letters.values())),
        "random": round(sum(100 / len(question.options) for question in questions) / n, 2),
        "longest option": share(chosen_right(longest)), "shortest option": share(chosen_right(shortest)),
        "class name in the text": sum(leaks(question.text, question.class_name) for question in questions),
        "same option twice": sum(len({o.lower() for o in q.options}) < len(q.options) for q in questions),
        'without "this object"': sum(
            not re.search(r"\b(this|these) objects?\b", question.text, re.IGNORECASE) for question in questions
        ),
    }  # fmt: skip


def card(title: str, source: Mapping[str, Any], stages: Mapping[str, int], checks: Mapping[str, Any]) -> str:
    """A data card in Markdown: where the questions come from, what each stage kept, and the audit."""
    lines = [f"# {title}", "", "Multiple-choice questions about images that need the class (paper, section 4).", ""]
    lines += [f"- {key}: {value}" for key, value in source.items() if value is not None]
    lines += ["", "| stage | rows |", "| --- | ---: |", *(f"| {name} | {count:,} |" for name, count in stages.items())]
    lines += ["", "| audit | |", "| --- | ---: |"]
    for name, value in checks.items():
        shown = ", ".join(f"{key} {count:,}" for key, count in value.items()) if isinstance(value, dict) else value
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"
