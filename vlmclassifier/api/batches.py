"""OpenAI's batch files: requests are written to be handed in, and their results are read back."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmclassifier.api.servers import OpenAI, is_refusal
from vlmclassifier.records import Reply, UserError

MOST_LINES, MOST_BYTES = 50_000, 190_000_000  # of one file: OpenAI takes 50,000 requests and 200 MB


def custom_id(run: str, example_id: str) -> str:
    """The name of a request: at most 64 characters, the same on every machine.

    `run`: what tells the run from others; so the results of another model or another question are not taken for its.
    """
    return hashlib.sha256(f"{run}\n{example_id}".encode()).hexdigest()[:40]


def write_batches(api: OpenAI, asked: Iterable[tuple[str, bytes, str]], folder: Path, name: str) -> list[Path]:
    """Write a request for every (custom id, JPEG, question) into FOLDER/NAME-1.jsonl and so on; return the files.

    Raises UserError where files of this name lie there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.glob(f"{glob.escape(name)}-*.jsonl")):
        raise UserError(f"{old[0]} exists already: hand it in, or remove the files of {name} first.")
    files: list[Path] = []
    lines = size = 0
    stream = None
    try:
        for identity, jpeg, question in asked:
            request = {"custom_id": identity, "method": "POST", "url": "/v1/chat/completions"}
            line = json.dumps(request | {"body": api.request(jpeg, question)}, ensure_ascii=False).encode() + b"\n"
            if stream is None or lines == MOST_LINES or size + len(line) > MOST_BYTES:
                if stream is not None:
                    stream.close()
                files.append(folder / f"{name}-{len(files) + 1}.jsonl")
                stream = open(files[-1].with_suffix(".part"), "wb")  # noqa: SIM115 - closed below, or for the next
                lines = size = 0
            stream.write(line)
            lines, size = lines + 1, size + len(line)
    finally:
        if stream is not None:
            stream.close()
    for file in files:  # an interrupted command leaves nothing that looks whole
        file.with_suffix(".part").replace(file)
    return files


def read_batch(api: OpenAI, file: Path) -> Iterator[tuple[str, str, Reply | None]]:
    """(custom id, text, reply) of every line of a results file; without a reply where the request failed, and why.

    Raises UserError that names the file and the row for what is not a line of a results file.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 within an answer
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): download the batch's output file again.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            identity, response, error = values["custom_id"], values["response"], values.get("error")
            if error or response["status_code"] != 200:
                text, reply = api.clean(error or response["body"]), None
                if response and response["status_code"] == 400 and is_refusal(json.dumps(response["body"])):
                    text, reply = "", Reply("refusal", api.model, 0, 0)
            else:
                text, reply = api.read(response["body"])
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{file} row {number} is not a line of a batch's results ({api.clean(repr(error))}): give the output "
                "file that OpenAI made, unchanged."
            ) from None
        yield identity, text, reply
