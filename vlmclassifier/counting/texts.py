"""Texts of training files, streamed: LLaVA's conversations, captions, JSON lines, plain text, `datasets` columns."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vlmclassifier.records import UserError, first_line

TEXT_KEYS = (
    "text",
    "caption",
    "value",
    "answer",
    "question",
    "captions",
    "texts",
)  # of a row, where it has no conversations


class PartialTextError(UserError):
    """A file ends or breaks in the middle: what was read before it is whole."""


def read_texts(file: Path, columns: Sequence[str] = ()) -> Iterator[str]:
    """The texts of one file, one after the other: the turns of conversations, captions, lines.

    FILE.json is an array of rows, or COCO's captions; FILE.jsonl has a row per line; any other file is text with a
    paragraph per line. A folder is a data set that `datasets` has saved. Each may end in .gz. `columns` name the fields
    of a row; where it has none of them: `conversations`, else one of TEXT_KEYS. Raises UserError for a file that has no
    texts, and PartialTextError, with the place, where it is truncated, no JSON, or not in UTF-8.
    """
    for text in _texts_of(file, columns):
        # JSON may name half a surrogate pair, which UTF-8 cannot: it becomes a question mark.
        yield text.encode("utf-8", "replace").decode()


def _texts_of(file: Path, columns: Sequence[str]) -> Iterator[str]:
    if file.is_dir():
        yield from _dataset_texts(file, columns)
        return
    kind = Path(file.name.removesuffix(".gz")).suffix
    try:
        with open(file, "rb") as raw:
            stream = gzip.open(raw) if file.suffix == ".gz" else raw  # noqa: SIM115 - `raw` is closed
            if kind == ".json":
                yield from _json_texts(file, stream, columns)
            else:
                yield from _line_texts(file, stream, columns, kind == ".jsonl")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PartialTextError(f"{file} is truncated or no gzip file ({first_line(error)}): get it again.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): fix the path.") from None


def _line_texts(file: Path, stream: BinaryIO, columns: Sequence[str], is_json: bool) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text) if is_json and text.strip() else text
        except UnicodeDecodeError as error:
            raise PartialTextError(
                f"{file} line {number} is not UTF-8 (byte {offset + error.start}): convert the file to UTF-8."
            ) from None
        except json.JSONDecodeError as error:
            raise PartialTextError(
                f"{file} line {number} is no JSON ({error.msg} at byte {offset + error.pos}): fix it or get it again."
            ) from None
        offset += len(line)
        if is_json and text.strip():
            yield from row_texts(row, columns, f"{file} line {number}")
        elif text.strip():
            yield text.strip()


def _json_texts(file: Path, stream: BinaryIO, columns: Sequence[str]) -> Iterator[str]:
    """The texts of a JSON array, or of the annotations of COCO's captions, without holding the file."""
    import ijson

    counted = _CountingStream(stream)
    head = counted.peek()
    prefix = "item" if head == b"[" else "annotations.item"
    number = 0
    try:
        for number, row in enumerate(ijson.items(counted, prefix, use_float=True), start=1):
            yield from row_texts(row, columns, f"{file} row {number}")
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise PartialTextError(
            f"{file} breaks behind row {number}, before byte {counted.offset} ({first_line(error)}): it is truncated, "
            "no JSON or not UTF-8; get it again."
        ) from None
    if number == 0:
        raise UserError(f'{file} has no rows: a JSON array of rows, or COCO\'s captions with "annotations", is read.')


class _CountingStream:
    """A stream that knows how many bytes were read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.offset, self._head = stream, 0, b""

    def peek(self) -> bytes:
        """The first byte that is no white space, which is read again later."""
        while (byte := self.stream.read(1)) and (byte.isspace() or byte in b"\xef\xbb\xbf"):
            pass
        self._head = byte
        return byte

    def read(self, size: int = -1) -> bytes:
        """As of any stream."""
        head, self._head = (self._head, b"") if size != 0 else (b"", self._head)
        data = head + self.stream.read(max(size - len(head), 0) if size > 0 else size)
        self.offset += len(data)
        return data


def row_texts(row: Any, columns: Sequence[str], where: str) -> Iterator[str]:
    """The texts of one row: a string, or a mapping. Raises UserError for a row without any."""
    if isinstance(row, str):
        yield row
        return
    if not isinstance(row, dict):
        raise UserError(f"{where} is no text and no mapping: fix it, or name the file's column with --column.")
    keys = [key for key in columns if key in row] or [key for key in ("conversations", *TEXT_KEYS) if key in row][:1]
    if not keys:
        raise UserError(
            f"{where} has none of {', '.join(columns or ('conversations', *TEXT_KEYS))}; it has "
            f"{', '.join(map(str, row))}: name its text with --column."
        )
    for value in (row[key] for key in keys):
        for turn in value if isinstance(value, list) else [value]:
            text = turn.get("value") if isinstance(turn, dict) else turn
            if isinstance(text, str):  # a turn without text is none
                yield text


def _dataset_texts(folder: Path, columns: Sequence[str]) -> Iterator[str]:
    """The texts of a folder that `datasets` has saved, or of its parquet and other files."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        saved = (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()
        data = load_from_disk(str(folder)) if saved else load_dataset(str(folder))
    except Exception as error:  # the library raises many types
        raise UserError(f"{folder} is no data set ({first_line(error)}): fix the path.") from None
    for part in data.values() if isinstance(data, DatasetDict) else [data]:
        for number, row in enumerate(part, start=1):
            yield from row_texts(row, columns, f"{folder} row {number}")
