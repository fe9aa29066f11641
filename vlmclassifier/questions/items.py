"""Multiple-choice questions about images in the format of ImageWikiQA (paper, section 4).

A file has one JSON object per line: {"image", "text", "label": "A".."D", "classname", "wiki"}. `text` is the question,
a line "A. ..." per option, and "Choose A, B, C, or D.".
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlmclassifier.paths import trusted_roots
from vlmclassifier.records import UserError

LETTERS = "ABCDEFGH"
IMAGE_FOLDERS = ("", "valid", "val")  # of ImageNet's validation images; the released file says images/NAME
OPTION = re.compile(r"([A-H])\. (.*)")
# What stands for the name in a question, the longest first.
SUBJECT = re.compile(r"\b(this|these) (object)(s?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class ChoiceQuestion:
    """One question about one image."""

    id: str  # a hash of image and text: the files have no ids
    image: str  # path as the file has it
    question: str
    options: tuple[str, ...]
    answer: int  # index of the right option
    class_name: str
    reference: str = ""  # the sentence that it is about
    row: str = ""  # "imagewikiqa.jsonl row 17", for error messages

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.answer]

    @property
    def text(self) -> str:
        """Question, options and the instruction."""
        return question_text(self.question, self.options)

    @property
    def place(self) -> str:
        """The image and the row of the file, for error messages."""
        return f"{self.image} ({self.row})"

    def to_line(self) -> str:
        """One JSON line in the format of the released file, newline included."""
        values = {"image": self.image, "text": self.text, "label": self.letter, "wiki": self.reference,
                  "classname": self.class_name}  # fmt: skip
        return json.dumps(values, ensure_ascii=False) + "\n"


def question_id(image: str, text: str) -> str:
    """A stable id: the first 16 hexadecimal digits of a hash of image and text."""
    return hashlib.sha256(f"{image}\n{text}".encode()).hexdigest()[:16]


def question_text(question: str, options: Sequence[str]) -> str:
    """The text of a multiple-choice question (paper, section 4)."""
    letters = LETTERS[: len(options)]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    separator = ", or " if len(letters) > 2 else " or "
    return "\n".join([question, *lines, f"Choose {', '.join(letters[:-1])}{separator}{letters[-1]}."])


def make_question(
    image: str, question: str, options: Sequence[str], answer: int, class_name: str, reference: str = "", row: str = ""
) -> ChoiceQuestion:  # fmt: skip
    """A question with the id of its image and text."""
    text = question_text(question, options)
    return ChoiceQuestion(question_id(image, text), image, question, tuple(options), answer, class_name, reference, row)


def with_name(question: str, name: str) -> str:
    """Return a question with a class name in place of "this object" (paper, Table 5: w/ GT Class).

    "This object" gets a capital letter, "these objects" the name + "s".
    """

    def replaced(match: re.Match) -> str:
        word = name + match[3]
        return word[:1].upper() + word[1:] if match[1][0].isupper() else word

    return SUBJECT.sub(replaced, question)


def read_questions(file: Path, limit: int | None = None) -> list[ChoiceQuestion]:
    """The questions of a file, in its order. Raises UserError that names the file and the row."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The questions {file} cannot be read ({error}): fix the path.") from None
    questions: dict[str, ChoiceQuestion] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parse_line(line, f"{file.name} row {number}")
        if question.id in questions:
            raise UserError(
                f"{question.row} and {questions[question.id].row} are the same question about one image: remove one."
            )
        questions[question.id] = question
    if not questions:
        raise UserError(f"{file} has no questions.")
    return list(questions.values())[:limit]


def _parse_line(line: str, row: str) -> ChoiceQuestion:
    try:
        values = json.loads(line)
        image, text, label, name = (values[key] for key in ("image", "text", "label", "classname"))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{row} is no question ({error!r}): it needs image, text, label and classname.") from None
    if not all(isinstance(value, str) and value.strip() for value in (image, text, label, name)):
        raise UserError(f"{row}: image, text, label and classname must be texts.")
    question, options = split_text(text, row)
    if label not in list(LETTERS[: len(options)]):
        raise UserError(f"{row}: the label {label!r} is none of its options, {', '.join(LETTERS[: len(options)])}.")
    wiki = values.get("wiki") or ""
    return ChoiceQuestion(
        question_id(image, text), image, question, options, LETTERS.index(label), name,
        wiki if isinstance(wiki, str) else json.dumps(wiki), row,
    )  # fmt: skip


def split_text(text: str, row: str) -> tuple[str, tuple[str, ...]]:
    """The question and the options of a text. Raises UserError where the options are not A, B, ... in order."""
    lines = text.strip().split("\n")
    if re.fullmatch(r"Choose [A-H](, [A-H])*,? or [A-H]\.", lines[-1].strip()):
        lines = lines[:-1]
    start = next((place for place, line in enumerate(lines) if line.startswith("A. ")), len(lines))
    options: list[str] = []
    for line in lines[start:]:
        match = OPTION.fullmatch(line)
        if match and match[1] == LETTERS[len(options)]:
            options.append(match[2].strip())
        elif match:
            raise UserError(f"{row}: after {len(options)} options comes {match[1]}: the letters must be in order.")
        elif options:
            options[-1] += f"\n{line}"  # an option of several lines
    question = "\n".join(lines[:start]).strip()
    if len(options) < 2 or not question or not all(options):
        raise UserError(f"{row}: the text has no question with options, a line 'A. ...', 'B. ...' each.")
    return question, tuple(options)


def image_file(root: Path, question: ChoiceQuestion) -> Path:
    """The file of a question's image below a trusted root. Raises UserError where it leaves that or is missing."""
    path = PurePosixPath(question.image)
    file = Path(os.path.abspath(root / path))
    roots = [Path(os.path.abspath(folder)) for folder in (root, *trusted_roots())]
    if not any(file.is_relative_to(folder) for folder in roots):
        raise UserError(f"{question.row}: the image path {question.image} leaves {root}: fix the row.")
    places = [file]
    if path.name.startswith("ILSVRC2012_val_"):
        places += [roots[0] / folder / path.name for folder in IMAGE_FOLDERS]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{question.row}: there is no image {file}: set --image-root to the folder that has it.")
