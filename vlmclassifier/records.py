"""The records that pass between the parts of the package, and the two errors that a user can fix."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields


class UserError(Exception):
    """A mistake that the user can fix: one sentence that names the file, the row and the remedy."""


class ContextError(UserError):
    """A prompt that does not fit into a model's context: the cell is N/A, there is nothing to fix."""


class RowError(UserError):
    """What is wrong with one row of a batch. `sentence` has {image} where the image is named."""

    def __init__(self, sentence: str, row: int | None = None, image: str = "an image") -> None:
        super().__init__(sentence.replace("{image}", image))
        self.sentence, self.row = sentence, row


@contextmanager
def rows_from(start: int) -> Iterator[None]:
    """Within it, row 0 of a RowError is row `start` of the caller's batch."""
    try:
        yield
    except RowError as error:
        raise type(error)(error.sentence, None if error.row is None else error.row + start) from None


@contextmanager
def images_named(images: Sequence[str]) -> Iterator[None]:
    """Within it, a RowError names the image of its row: the file and where the manifest has it."""
    try:
        yield
    except RowError as error:
        if error.row is None:
            raise
        raise type(error)(error.sentence, error.row, images[error.row]) from None


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Example:
    """One labelled image of a benchmark."""

    id: str  # stable: the image path as the manifest has it
    image: str  # path of the file on this machine
    label: str  # class name
    class_index: int  # distinguishes equal names: ImageNet has two classes "missile"
    split: str
    row: str = ""  # "flowers.jsonl row 17", for error messages
    note: str = ""  # the manifest's note about the row, such as "not the paper's split"; it becomes a tag

    @property
    def place(self) -> str:
        """The image and its manifest row, for error messages."""
        return f"{self.image} ({self.row})"


@dataclass(frozen=True)
class Question:
    """The question about one image; `choices` is None in the open world."""

    text: str
    choices: tuple[str, ...] | None


@dataclass(frozen=True)
class Reply:
    """What an API returned beside the text."""

    finish: str  # stop, length (cut at the token limit), refusal or empty
    model: str  # the id that answered: an alias may stand for several
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Prediction:
    """The answer of a model to one example. Whether it is right is derived later, without a model."""

    example_id: str
    label: str
    class_index: int
    prompt: str  # the whole text given to the model; for CLIP the caption with {}
    choices: tuple[str, ...] | None
    output: str  # the raw text; for CLIP and rankings the name of the best class
    ranking: tuple[int, ...] | None  # class indices, best first; None for free text
    reply: Reply | None = None  # of an API; left out of the JSON line where there is none


@dataclass(frozen=True)
class Score:
    """One number of a table, in percent with a 95% interval. It joins with `paper.csv` on the first four columns.

    `tags` say what makes the run differ from the paper's ("miniature", "split train", "imported", ...).
    """

    model: str
    setting: str
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    tags: tuple[str, ...] = ()


def to_line(prediction: Prediction) -> str:
    """One JSON line, newline included."""
    values = asdict(prediction)
    if values["reply"] is None:
        del values["reply"]
    line = json.dumps(values, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "replace").decode()  # half a surrogate pair, which a server may send, is not UTF-8


def prediction_from_line(line: str) -> Prediction:
    """The inverse of `to_line`. Raises ValueError on a line that is not a whole prediction."""
    values = json.loads(line)
    if not isinstance(values, dict) or {*values, "reply"} != {field.name for field in fields(Prediction)}:
        raise ValueError("not a prediction")
    if "reply" in values:
        if not isinstance(values["reply"], dict) or set(values["reply"]) != {field.name for field in fields(Reply)}:
            raise ValueError("not a reply")
        values["reply"] = Reply(**values["reply"])
    for name in ("choices", "ranking"):
        if values[name] is not None:
            values[name] = tuple(values[name])
    if values["choices"] is not None:  # 1,000 names in each of 50,000 rows: keep one copy of each
        values["choices"] = tuple(sys.intern(choice) for choice in values["choices"])
    return Prediction(**values)
