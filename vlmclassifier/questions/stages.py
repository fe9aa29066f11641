"""One stage of a construction: rows in a JSON-lines file, one per key, written as they come, never computed twice."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmclassifier.records import UserError
from vlmclassifier.runs.record import replace_file

Results = Iterator[tuple[str, dict[str, Any] | Exception]]


class Stage:
    """Rows {"key", ...} of a file. `keys`: all keys, in the order in which the finished file has them."""

    def __init__(self, file: Path, keys: Sequence[str]) -> None:
        self.file, self.keys = file, list(keys)
        self.rows = self._read()

    @property
    def pending(self) -> list[str]:
        """The keys without a row."""
        return [key for key in self.keys if key not in self.rows]

    def run(self, results: Callable[[Sequence[str]], Results], title: str) -> list[Exception]:
        """Compute what is pending: `results(keys)` yields (key, row or exception) as they come. Returns the exceptions.

        Every row is on the disk before the next; in the end the file has them in the order of the keys, and behind them
        rows of other keys, which were paid for too.
        """
        from tqdm import tqdm

        failures = []
        if pending := self.pending:
            with open(self.file, "a", encoding="utf-8") as stream:
                for key, result in tqdm(results(pending), title, len(pending), unit="row"):
                    if isinstance(result, Exception):
                        failures.append(result)
                        continue
                    self.rows[key] = {"key": key} | result
                    stream.write(self._line(key))
                    stream.flush()
        known = set(self.keys)
        order = [key for key in self.keys if key in self.rows] + [key for key in self.rows if key not in known]
        replace_file(self.file, "".join(self._line(key) for key in order))
        return failures

    def _line(self, key: str) -> str:
        return json.dumps(self.rows[key], ensure_ascii=False) + "\n"

    def _read(self) -> dict[str, Mapping[str, Any]]:
        """The rows that are there; a line that was cut off is dropped. Raises UserError for another file."""
        if not self.file.exists():
            return {}
        found: dict[str, Mapping[str, Any]] = {}
        lines = self.file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = json.loads(line)
                found[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise UserError(f"{self.file} row {number} is no row of this stage: move the file away.") from None
                replace_file(self.file, "".join(f"{line}\n" for line in lines[:-1]))
        return found
