"""A run is a folder: run.json, predictions.jsonl, and what is computed from them. See `store`."""

from vlmclassifier.runs.record import OldFormatError, read_record
from vlmclassifier.runs.store import Run, has_rows, open_run, pending_together, read_rows, read_run, recorded_rows

__all__ = [
    "OldFormatError", "Run", "has_rows", "open_run", "pending_together", "read_record", "read_rows", "read_run",
    "recorded_rows",
]  # fmt: skip
