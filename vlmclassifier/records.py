"""The records that pass between the rooms of this house, each one JSON line on disk."""

import json
import sys
from dataclasses import asdict, dataclass, fields


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the file, the row and the remedy."""


class ContextError(UserError):
    """A question that does not fit into a model's context: a cell that is N/A, not a mistake to mend."""


@dataclass(frozen=True)
class Example:
    """One labelled picture of a benchmark."""

    id: str  # stable: the image path as the manifest has it
    benchmark: str
    image: str  # path of the file on this machine
    label: str  # class name
    class_index: int  # tells equal names apart: ImageNet names two classes "missile"
    split: str
    row: str = ""  # "flowers.jsonl row 17", for error messages
    note: str = ""  # what the manifest says of the row, such as "not the paper's split"; tables show it


@dataclass(frozen=True)
class Question:
    """One question about one picture: `choices` is None in the open world."""

    text: str
    choices: tuple[str, ...] | None
    answer: str


@dataclass(frozen=True)
class Reply:
    """What came with an API's answer."""

    finish: str  # stop, length (cut at the limit of tokens), refusal or empty
    model: str  # the id that answered: an alias may stand for several
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Prediction:
    """What a model said of one example. Whether it is right is derived later, without a model."""

    example_id: str
    label: str
    class_index: int
    prompt: str  # the whole text given to the model; for CLIP the caption with {}
    choices: tuple[str, ...] | None
    output: str  # the raw text; for CLIP the name of the best class
    answer: str | None  # what a parser read out of `output`, where one is needed
    ranking: tuple[int, ...] | None  # class indices, best first; None for free text
    reply: Reply | None = None  # of an API; left out of the line where there is none


@dataclass(frozen=True)
class Score:
    """One cell of a table; the key columns are those of `paper.csv`. Values are percentages."""

    section: str
    table: str
    model: str
    setting: str
    dataset: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def to_line(record: Prediction | Score) -> str:
    """One JSON line, newline included."""
    values = asdict(record)
    if "reply" in values and values["reply"] is None:
        del values["reply"]
    line = json.dumps(values, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "replace").decode()  # half a character, which a server may send, is no UTF-8


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
        values["choices"] = tuple(map(sys.intern, values["choices"]))
    return Prediction(**values)
