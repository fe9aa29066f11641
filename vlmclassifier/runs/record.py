"""run.json: the configuration of a run, its progress, and the versions that made its rows."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmclassifier.records import UserError

FORMAT = 2  # of run folders; format 1 had other fields in run.json and in the rows
# No part of a run's identity: a larger limit continues the same run, and so do rows that are added to the manifest or
# removed from it; recorded rows that are evaluated no longer are kept. Tags are what the latest command says.
ROWS_KEYS = ("manifest", "skipped_images")  # another value: other rows are evaluated
NOTE_KEYS = ("tags", "verified")
EXTENDABLE_KEYS = ("limit", *ROWS_KEYS, *NOTE_KEYS)
OPTIONAL_KEYS = ("template",)  # a record without them is taken to agree


class OldFormatError(UserError):
    """A run folder that an older version of this project wrote."""


def new_record(config: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that has not begun."""
    return {
        "format": FORMAT, "config": config, "started": now(), "finished": None, "rows": 0, "target": 0, "sessions": [],
    }  # fmt: skip


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run folder. Raises UserError when it cannot be read, OldFormatError for an older format."""
    file = folder / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record |= {key: value for key, value in new_record({}).items() if key not in record and key != "format"}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}): fix it or move the run folder away.") from None
    if record.get("format") != FORMAT:
        raise OldFormatError(
            f"{folder} has format {record.get('format', 1)} of another version of this project, which is not read "
            f"(this version writes {FORMAT}): move the folder away and run the command again."
        )
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json; the caller holds the folder's lock."""
    replace_file(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def differing_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two configurations contradict each other."""
    compared = [
        key for key in {**old, **new} if key not in EXTENDABLE_KEYS and (key in old or key not in OPTIONAL_KEYS)
    ]
    return [key for key in compared if old.get(key) != new.get(key)]


def refuse_difference(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError, with the difference shown, when a folder holds a run of another configuration."""
    if keys := differing_keys(old, new):
        shown = "; ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in keys)
        raise UserError(
            f"{folder} holds a run of another configuration ({shown}): remove it, or choose another one (--out)."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def replace_file(file: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old or the new one; an unchanged one is left alone."""
    if file.exists() and file.read_bytes() == text.encode():
        return
    temporary = file.with_name(f".{file.name}.new")  # one name is enough: every caller holds the folder's lock
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def now() -> str:
    """The time as recorded in run.json."""
    return datetime.now(UTC).isoformat(timespec="seconds")
