"""OpenAI's batch files: write files of requests for submission, and read files of results."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmclassifier.api.client import is_refusal
from vlmclassifier.api.providers import OpenAI
from vlmclassifier.records import Reply, UserError

MAX_LINES, MAX_BYTES = 50_000, 190_000_000  # of one file: OpenAI accepts 50,000 requests and 200 MB


def custom_id(run: str, example_id: str) -> str:
    """The id of a request: at most 64 characters, and the same on every machine.

    `run`: a text that identifies the run, so that results of another model or prompt are not mistaken for results of
    this run.
    """
    return hashlib.sha256(f"{run}\n{example_id}".encode()).hexdigest()[:40]


def write_batches(api: OpenAI, requests: Iterable[tuple[str, bytes, str]], folder: Path, name: str) -> list[Path]:
    """Write one request per (custom id, JPEG, question) to FOLDER/NAME-1.jsonl, FOLDER/NAME-2.jsonl, ...

    Returns the files. Raises UserError when files of this name already exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(folder.glob(f"{glob.escape(name)}-*.jsonl"))
    if existing:
        raise UserError(f"{existing[0]} exists already: submit it, or remove the files of {name} first.")
    files: list[Path] = []
    lines = size = 0
    stream = None
    try:
        for request_id, jpeg, question in requests:
            request = {"custom_id": request_id, "method": "POST", "url": "/v1/chat/completions"}
            line = json.dumps(request | {"body": api.request(jpeg, question)}, ensure_ascii=False).encode() + b"\n"
            if stream is None or lines == MAX_LINES or size + len(line) > MAX_BYTES:
                if stream is not None:
                    stream.close()
                files.append(folder / f"{name}-{len(files) + 1}.jsonl")
                stream = open(files[-1].with_suffix(".part"), "wb")  # noqa: SIM115 - closed here or in `finally`
                lines = size = 0
            stream.write(line)
            lines, size = lines + 1, size + len(line)
    finally:
        if stream is not None:
            stream.close()
    for file in files:  # renamed at the end, so that an interrupted command leaves no file that looks complete
        file.with_suffix(".part").replace(file)
    return files


def read_batch(api: OpenAI, file: Path) -> Iterator[tuple[str, str, Reply | None]]:
    """Yield (custom id, text, reply) for every line of a results file.

    For a failed request, the reply is None and the text is the reason. Raises UserError, with the file and the row, for
    a line that does not belong in a results file.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 within an answer
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): download the batch's output file again.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            request_id, response, error = values["custom_id"], values["response"], values.get("error")
            if error or response["status_code"] != 200:
                text, reply = api.redact(error or response["body"]), None
                if response and 400 <= response["status_code"] < 500 and is_refusal(json.dumps(response["body"])):
                    text, reply = "", Reply("refusal", api.model, 0, 0)
            else:
                text, reply = api.parse(response["body"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{file} row {number} is not a line of a batch's results ({api.redact(repr(error))}): use OpenAI's "
                "output file of the batch, unchanged."
            ) from None
        yield request_id, text, reply
