"""Training rows on `datasets`: classification rows, captions, LLaVA's conversations, mixtures of them.

A row has an id, an image (an absolute path and the folder that must contain it; empty for a text-only row), the class
name where it is known, and turns of question and answer.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from vlmclassifier.probing import held_out_rows
from vlmclassifier.prompts import QUESTIONS
from vlmclassifier.records import Example, UserError, first_line

PLACEHOLDER = "<image>"
COLUMNS = Features({
    "id": Value("string"), "image": Value("string"), "root": Value("string"), "label": Value("string"),
    "turns": [{"question": Value("string"), "answer": Value("string")}],
})  # fmt: skip


def classification_rows(examples: Sequence[Example], root: Path, wording: str = "base") -> Dataset:
    """Return a row per image: the question of a wording, and the class name as the answer (paper, section 4).

    With the wording "none" the answer is "a photo of CLASS" without a question, as in the reference's BLIP-2 training.
    """
    rows = []
    for example in examples:
        answer = example.label if wording != "none" else f"a photo of {example.label}"
        turns = [{"question": QUESTIONS[wording], "answer": answer}]
        rows.append(_row(example.id, str(example.image), root, example.label, turns))
    return _dataset(rows)


def caption_rows(examples: Sequence[Example], root: Path, captions: Path) -> Dataset:
    """Return a row per image that has a caption in a file of make_captions.py: {"id", "caption"} per line (Table 4).

    Raises UserError for a file that cannot be read, and where no image has a caption.
    """
    caption_of = {}
    for number, row in enumerate(_json_lines(captions), start=1):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("caption"), str | None):
            raise UserError(f'{captions} line {number} is not {{"id": ..., "caption": ...}}: fix it.')
        if row.get("caption"):
            caption_of[row["id"]] = row["caption"]
    rows = []
    for example in examples:
        if example.id in caption_of:
            turns = [{"question": QUESTIONS["caption"], "answer": caption_of[example.id]}]
            rows.append(_row(example.id, str(example.image), root, example.label, turns))
    if not rows:
        raise UserError(f"{captions} has no caption of an image of this split: make them with make_captions.py.")
    return _dataset(rows)


def conversation_rows(file: Path, image_root: Path) -> Dataset:
    """Return a row per conversation of a LLaVA training file, which is streamed: dialogues and text-only rows too.

    The image placeholder is removed from the first question: the model's own template sets it. Raises UserError for a
    file of another form, which names the row.
    """
    stat = file.stat() if file.exists() else None
    if stat is None:
        raise UserError(f"{file} does not exist: fix the path of the conversations.")
    arguments = {"file": str(file), "root": str(image_root.resolve()), "version": (stat.st_size, stat.st_mtime_ns)}
    try:
        return Dataset.from_generator(_conversations, features=COLUMNS, gen_kwargs=arguments)
    except Exception as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(
            f"{file} cannot be read ({first_line(cause)}): a JSON array of conversations is needed."
        ) from None


def _conversations(file: str, root: str, version: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The rows of a LLaVA file. `version` is part of the key under which `datasets` keeps them."""
    import ijson

    with open(file, "rb") as stream:
        for number, item in enumerate(ijson.items(stream, "item", use_float=True), start=1):
            yield conversation_row(item, f"{file} row {number}", Path(root), str(number))


def conversation_row(item: Any, where: str, root: Path, number: str) -> dict[str, Any]:
    """One conversation of LLaVA's format as a row. Raises UserError for another form."""
    turns = item.get("conversations") if isinstance(item, dict) else None
    sides = [turn.get("from") for turn in turns] if isinstance(turns, list) else []
    if not sides or sides != ["human", "gpt"] * (len(sides) // 2):
        raise UserError(f'{where} has no "conversations" of human and gpt in turn: fix or remove the row.')
    pairs = []
    for place in range(0, len(turns), 2):
        question, answer = turns[place].get("value"), turns[place + 1].get("value")
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{where} has a turn without text: fix or remove the row.")
        pairs.append({"question": question.replace(PLACEHOLDER, "").strip(), "answer": answer.strip()})
    image = item.get("image") or ""
    row_id = f"{number}:{item.get('id', '')}"  # ids of the original files repeat
    return _row(row_id, str(root / image) if image else "", root if image else "", item.get("class", ""), pairs)


def held_out_examples(examples: Sequence[Example], names: Sequence[str], seed: int, share: float) -> list[bool]:
    """Which examples are not trained on: a share of every class, by (seed, id) alone."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    ids, classes = [example.id for example in examples], [numbers[example.label] for example in examples]
    return held_out_rows(ids, classes, seed, share).tolist()


def mixture(parts: Sequence[tuple[Dataset, float]], seed: int) -> Dataset:
    """Return the rows of several data sets together, shuffled by the seed (paper, section 4: ImageNet + LLaVA's rows).

    Each part has a weight: 1 takes all of its rows once, 0.5 half of them, drawn by the seed, 2 all of them twice.
    """
    taken = []
    for number, (rows, weight) in enumerate(parts):
        whole, rest = divmod(weight, 1)
        taken += [rows] * int(whole)
        if rest:
            taken.append(rows.shuffle(seed=seed + number).select(range(round(rest * len(rows)))))
    mixed = concatenate_datasets(taken)
    if not len(mixed):
        raise UserError("The mixture has no rows: raise its weights.")
    return mixed.shuffle(seed=seed)


def export_conversations(rows: Dataset, file: Path) -> None:
    """Write rows as LLaVA's JSON array, one row per line, with image paths relative to their root."""
    with open(file, "w", encoding="utf-8") as stream:
        for number, row in enumerate(rows):
            item: dict[str, Any] = {"id": row["id"]}
            if row["image"]:
                item["image"] = os.path.relpath(Path(row["image"]).resolve(), row["root"])
            if row["label"]:
                item["class"] = row["label"]
            item["conversations"] = []
            for place, turn in enumerate(row["turns"]):
                marked = row["image"] and place == 0
                question = f"{PLACEHOLDER}\n{turn['question']}" if marked else turn["question"]
                item["conversations"] += [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": turn["answer"]},
                ]
            stream.write(("[\n" if number == 0 else ",\n") + json.dumps(item, ensure_ascii=False))
        stream.write("\n]\n")


def _row(row_id: str, image: str, root: Path | str, label: str, turns: list[dict[str, str]]) -> dict[str, Any]:
    root = str(Path(root).resolve()) if root else ""
    image = str(Path(image).absolute()) if image else ""
    return {"id": row_id, "image": image, "root": root, "label": label, "turns": turns}


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows, features=COLUMNS)


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                row = json.loads(line) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise UserError(f"{file} line {number} is no JSON object: fix it.")
                if row is not None:
                    yield row
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): JSON lines are needed.") from None
