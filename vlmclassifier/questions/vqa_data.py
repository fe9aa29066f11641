"""Questions of the general benchmarks (paper, Table 13), from official files or the hub's parquet.

Official files: TextVQA_0.5.1_val.json, coco_pope_popular.json and coco_pope_adversarial.json, AI2D's folder questions/,
DocVQA's val_v1.0.json, mm-vet.json. Hub: the parquet files of lmms-lab, whose images are written to a folder.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmclassifier.questions.items import LETTERS, question_text
from vlmclassifier.records import Prediction, UserError

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class VqaBenchmark:
    """One general benchmark: how it is asked, and how many questions its official split has."""

    key: str
    title: str
    ending: str  # of the prompt, as LLaVA's evaluation has it
    rows: int
    metric: str  # what the paper's table has
    new_tokens: int = 64  # of the longest answer


VQA_BENCHMARKS = {
    benchmark.key: benchmark
    for benchmark in (
        VqaBenchmark("textvqa", "TextVQA, validation", SHORT, 5_000, "vqa_accuracy"),
        VqaBenchmark("pope_popular", "POPE, popular", SHORT, 3_000, "f1"),
        VqaBenchmark("pope_adversarial", "POPE, adversarial", SHORT, 3_000, "f1"),
        VqaBenchmark("ai2d", "AI2D, test", LETTER, 3_088, "letter"),
        VqaBenchmark("docvqa", "DocVQA, validation", SHORT, 5_349, "anls"),
        VqaBenchmark("mmvet", "MM-Vet", "", 218, "judge", 1_024),
    )
}


@dataclass(frozen=True)
class VqaQuestion:
    """One question about one image."""

    id: str
    image: str
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    ocr: tuple[str, ...] = ()  # TextVQA: words that Rosetta read
    row: str = ""

    @property
    def place(self) -> str:
        """The image and the row, for error messages."""
        return f"{self.image} ({self.row})"


@dataclass(frozen=True)
class VqaSetting:
    """How a benchmark is asked; it has what `answering.Answerer` needs of a questions.settings.QuestionSetting."""

    benchmark: VqaBenchmark
    with_ocr: bool = True
    form = "vqa"
    has_image = True
    has_thought = False
    is_ranked = False
    given = "image"

    @property
    def new_tokens(self) -> int:
        """The longest answer in tokens."""
        return self.benchmark.new_tokens

    @property
    def name(self) -> str:
        """The setting column of tables; "official" is the paper's."""
        return "official" if self.with_ocr or self.benchmark.key != "textvqa" else "official-no_ocr"

    @property
    def config(self) -> dict[str, Any]:
        """What run.json records."""
        return {"setting": self.name, "form": self.form}

    def shown(self, question: VqaQuestion, own_name: Any = None) -> str:
        """The text of the prompt."""
        if question.options:
            text = question_text(question.question, question.options).rpartition("\n")[0]
        else:
            text = question.question
        if self.with_ocr and question.ocr:
            text += f"\nReference OCR token: {', '.join(question.ocr)}"
        return text + self.benchmark.ending

    def label(self, question: VqaQuestion) -> str:
        """The JSON list of right answers."""
        return json.dumps(list(question.answers), ensure_ascii=False)

    def row(
        self, question: VqaQuestion, group: int, prompt: str, output: str, ranking: tuple[int, ...] | None = None
    ) -> Prediction:  # fmt: skip
        """The row of an answer: the label is the JSON list of right answers, `class_index` the number of the image."""
        return Prediction(question.id, self.label(question), group, prompt, question.options or None, output, ranking)


def load_vqa(key: str, source: Path, ocr: Path | None, images: Path) -> list[VqaQuestion]:
    """The questions of a benchmark. `source`: an official file or folder, or a folder of parquet files of the hub.

    `ocr`: TextVQA's file of Rosetta's words. `images`: where the images of parquet files are written. Raises UserError
    for a file of another form.
    """
    parquets = sorted(source.rglob("*.parquet")) if source.is_dir() else []
    if source.suffix == ".parquet":
        parquets = [source]
    if len(splits := {file.name.split("-")[0] for file in parquets if "-" in file.name}) > 1:
        raise UserError(f"{source} has parquet files of several splits ({', '.join(sorted(splits))}): give one file.")
    try:
        if parquets:
            questions = list(_hub(key, parquets, images))
        else:
            questions = list(OFFICIAL[key](source, _words(ocr) if ocr else {}))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{source} is no file of {VQA_BENCHMARKS[key].title} ({error!r}): fix the path.") from None
    if not questions:
        raise UserError(f"{source} has no questions of {VQA_BENCHMARKS[key].title}.")
    if len({question.id for question in questions}) < len(questions):
        raise UserError(f"{source} has two questions of one id: it is not the official file.")
    return questions


def _words(file: Path) -> dict[str, tuple[str, ...]]:
    rows = json.loads(file.read_text(encoding="utf-8"))["data"]
    return {row["image_id"]: tuple(row["ocr_tokens"]) for row in rows}


def _textvqa(file: Path, ocr: dict[str, tuple[str, ...]]) -> Iterator[VqaQuestion]:
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8"))["data"], start=1):
        words = ocr.get(row["image_id"], ())
        yield VqaQuestion(str(row["question_id"]), f"{row['image_id']}.jpg", row["question"], tuple(row["answers"]),
                          ocr=words, row=f"{file.name} question {number}")  # fmt: skip


def _pope(file: Path, ocr: Any) -> Iterator[VqaQuestion]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        yield VqaQuestion(str(row["question_id"]), row["image"], row["text"], (_yes_or_no(row["label"]),),
                          row=f"{file.name} row {number}")  # fmt: skip


def _yes_or_no(label: str) -> str:
    if label.lower() not in ("yes", "no"):
        raise ValueError(f"the label {label!r}")
    return label.lower()


def _ai2d(folder: Path, ocr: Any) -> Iterator[VqaQuestion]:
    listed = folder / "ai2d_test_ids.csv"  # the test split; without it every image counts
    test = set(listed.read_text(encoding="utf-8").split()) if listed.exists() else None
    images = "images/" if (folder / "images").is_dir() else ""
    for file in sorted((folder / "questions" if (folder / "questions").is_dir() else folder).glob("*.json")):
        values = json.loads(file.read_text(encoding="utf-8"))
        if test is not None and Path(values["imageName"]).stem not in test:
            continue
        for text, row in values["questions"].items():
            if not row.get("abcLabel"):  # the labels of others are replaced in other images
                right = (LETTERS[int(row["correctAnswer"])],)
                yield VqaQuestion(row["questionId"], images + values["imageName"], text, right,
                                  tuple(row["answerTexts"]), row=file.name)  # fmt: skip


def _docvqa(file: Path, ocr: Any) -> Iterator[VqaQuestion]:
    for number, row in enumerate(json.loads(file.read_text(encoding="utf-8"))["data"], start=1):
        yield VqaQuestion(str(row["questionId"]), row["image"], row["question"], tuple(row["answers"]),
                          row=f"{file.name} question {number}")  # fmt: skip


def _mmvet(file: Path, ocr: Any) -> Iterator[VqaQuestion]:
    for key, row in json.loads(file.read_text(encoding="utf-8")).items():
        yield VqaQuestion(key, row["imagename"], row["question"], (row["answer"],), row=f"{file.name} {key}")


OFFICIAL = {"textvqa": _textvqa, "pope_popular": _pope, "pope_adversarial": _pope, "ai2d": _ai2d, "docvqa": _docvqa,
            "mmvet": _mmvet}  # fmt: skip


def _hub(key: str, files: Sequence[Path], images: Path) -> Iterator[VqaQuestion]:
    """The rows of parquet files; their images are written to `images`, each once."""
    import pyarrow.parquet as pq

    images.mkdir(parents=True, exist_ok=True)
    number = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                if key.startswith("pope_") and row.get("category", key[5:]) != key[5:]:
                    continue
                ids = [row.get(name) for name in ("question_id", "questionId", "id")]
                identity = str(next((one for one in ids if one is not None), number))
                name = _write_image(images, row["image"]["bytes"])
                options = tuple(row.get("options") or ())
                answers = row.get("answers") or [row["answer"]]
                if options:
                    answers = [LETTERS[int(row["answer"])]]
                elif key.startswith("pope_"):
                    answers = [_yes_or_no(row["answer"])]
                yield VqaQuestion(identity, name, row["question"], tuple(answers), options,
                                  tuple(row.get("ocr_tokens") or ()), f"{file.name} row {number}")  # fmt: skip


def _write_image(folder: Path, data: bytes) -> str:
    """Write an image by the hash of its bytes, once; returns its name."""
    suffix = ".png" if data.startswith(b"\x89PNG") else ".jpg"
    name = f"{hashlib.sha256(data).hexdigest()[:20]}{suffix}"
    if not (folder / name).exists():
        unfinished = folder / f".{name}.{os.getpid()}"
        unfinished.write_bytes(data)
        unfinished.replace(folder / name)
    return name
