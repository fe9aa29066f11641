"""A run folder: {run.json, predictions.jsonl}, safe against crashes and shared by any number of processes.

Every process appends its rows to a part file of its own and works in leases of one batch (two are held while the next
one is prefetched). A lease is an advisory lock (`fcntl.lockf`) on one byte of `.lock`, which the operating system
releases when its holder dies; the rows are the only record of what is done. So start the same command as often as you
like, at the same time or after a crash: the processes share the work, and the last one to finish merges the parts in
the evaluation order. A run may keep a float32 vector with every row (`values.py`).
"""

import fcntl
import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.provenance import git_commit, versions
from vlmclassifier.records import Prediction, UserError, prediction_from_line, to_line
from vlmclassifier.values import ROWS, VALUES, mend_part, part_values, read_part, read_values, write_values

if TYPE_CHECKING:
    from numpy import ndarray

FOLDER_LOCK = 1 << 40  # this byte of `.lock` guards run.json, the choice of part files and the merge
ALIVE = FOLDER_LOCK + 1  # shared by the processes that have the run open
IN_FLIGHT = 4  # batches that may be written but not yet on the disk
EXTENDABLE = ("limit",)  # a larger limit continues the same run
LATER = ("template",)  # what older records do not say: they are taken to agree


class Run:
    """One run: `pending` deals out work, `append` makes it safe, `finish` merges. Made by `open_run`."""

    def __init__(self, folder: Path, order: Sequence[str], width: int = 0) -> None:
        self.folder = folder
        self.order = list(order)
        self.width = width  # of the vector that goes with every row; 0: none
        self.done: set[str] = set()
        self._offsets: dict[Path, tuple[int, int]] = {}  # file -> (inode, bytes read)
        self._leases: dict[int, set[str]] = {}  # leases held -> ids still to be recorded
        self._merged: tuple[int, int] | None = None  # inode and time of predictions.jsonl when it was last seen
        self._guard = threading.RLock()  # `pending` may run in a prefetch thread beside `append`
        self._locks = open(folder / ".lock", "a+b")  # noqa: SIM115 - held until `finish`; closing drops every lock
        self._part: Any = None
        self._part_values: Any = None
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._on_disk: deque[Future] = deque()  # one fsync per batch, oldest first

    @property
    def complete(self) -> bool:
        """Whether every example of the order has a row."""
        return self.done.issuperset(self.order)

    def pending(self, batch_size: int, last: Collection[str] = ()) -> Iterator[list[str]]:
        """Yield lists of example ids that nobody has answered or is working on, until every id has a row.

        `last`: ids that are left to the end.

        Waits at the end for other processes; a lease that its holder lost (by dying) is taken over. Processes of other
        batch sizes cut other leases: they may compute a row twice, but the merged file has it once.
        """
        for (left,) in pending_together([self], batch_size, last):
            yield left

    def _lease(self, start: int, ids: Sequence[str]) -> list[str]:
        """The ids of a lease, which this process holds, that have no row yet; without any the lease ends."""
        self._read_new_rows()
        left = [i for i in ids if i not in self.done]
        if left:
            with self._guard:
                self._leases[start] = set(left)
        else:
            self._unlock_byte(start)
        return left

    def append(self, predictions: Sequence[Prediction], values: "ndarray | None" = None) -> None:
        """Write a batch of rows; they reach the disk (fsync) while the next batch is computed, then its lease ends.

        `values`: float32 [rows, width], where the run keeps vectors.

        A disk that is slow for a moment holds nothing up, one that lags by IN_FLIGHT batches is waited for; an error of
        the disk is raised here or in `finish`.
        """
        self._wait_for_disk(IN_FLIGHT - 1)
        if self._part is None:
            self._open_part()
        if self.width:  # before the rows: a row that is there has its vector
            if values is None or values.shape != (len(predictions), self.width) or values.dtype != "float32":
                raise ValueError(f"every row needs a float32 vector of {self.width} numbers")
            self._part_values.write(values.tobytes())
            self._part_values.flush()
        self._part.write("".join(map(to_line, predictions)).encode())
        self._part.flush()
        ids = {prediction.example_id for prediction in predictions}
        with self._guard:
            self.done |= ids
        self._on_disk.append(self._disk.submit(self._make_safe, ids))

    def _make_safe(self, ids: set[str]) -> None:
        for file in (self._part_values, self._part):
            if file is not None:
                os.fsync(file.fileno())
        with self._guard:
            for start in [start for start, waiting in self._leases.items() if waiting & ids]:
                self._leases[start] -= ids
                if not self._leases[start]:
                    del self._leases[start]
                    self._unlock_byte(start)

    def _wait_for_disk(self, in_flight: int = 0) -> None:
        while self._on_disk and (len(self._on_disk) > in_flight or self._on_disk[0].done()):
            self._on_disk.popleft().result()

    def keep(self, constants: "Mapping[str, ndarray]") -> None:
        """Keep tensors of the whole run beside the rows' vectors, before the first row; those that are there stay."""
        import numpy as np

        self._lock_byte(FOLDER_LOCK, wait=True)
        try:
            ids, stored = read_values(self.folder) if (self.folder / VALUES).exists() else ([], {})
            values = stored.pop(ROWS, np.zeros((0, self.width), dtype=np.float32))
            write_values(self.folder, ids, values, dict(constants) | stored)
        finally:
            self._unlock_byte(FOLDER_LOCK)

    def finish(self) -> list[Prediction]:
        """Merge the parts into predictions.jsonl in the evaluation order and return all its rows."""
        self._wait_for_disk()
        self._disk.shutdown()
        if self._part is not None:
            self._part.close()
            self._part = None
        if self._part_values is not None:
            self._part_values.close()
            self._part_values = None
        self._lock_byte(FOLDER_LOCK, wait=True)
        try:
            merged = self._merge()
        finally:
            self._unlock_byte(FOLDER_LOCK)
        self._locks.close()
        return merged

    def not_applicable(self, reason: str) -> None:
        """Note in run.json why this cell stays empty, for the tables."""
        self._lock_byte(FOLDER_LOCK, wait=True)
        record = _read_record(self.folder / "run.json") | {"not_applicable": reason}
        _write_record(self.folder, record)
        self._unlock_byte(FOLDER_LOCK)

    def _merge(self) -> list[Prediction]:
        parts = [file for file in map(_lock_file, self._part_files()) if file]
        rows: dict[str, Prediction] = {}
        vectors: dict[str, ndarray] = {}
        constants: dict[str, ndarray] = {}
        if self.width and (self.folder / VALUES).exists():
            ids, constants = read_values(self.folder)
            vectors = dict(zip(ids, constants.pop(ROWS), strict=True))
        for file in [self.folder / "predictions.jsonl", *self._part_files()]:
            found = _rows_from(file, 0)[0] if file.exists() else []
            if self.width and found and file.name != "predictions.jsonl":
                for row, vector in zip(found, read_part(file, len(found), self.width), strict=True):
                    vectors.setdefault(row.example_id, vector)
            for prediction in found:
                rows.setdefault(prediction.example_id, prediction)
        ordered = [rows.pop(i) for i in self.order if i in rows] + list(rows.values())
        if self.width and ordered:  # before the rows: its ids tell whose vectors it holds
            import numpy as np

            ids = [row.example_id for row in ordered]
            if missing := [i for i in ids if i not in vectors]:
                raise UserError(
                    f"{self.folder} has rows without their numbers ({missing[0]}, say): {VALUES} was removed or "
                    "changed; put it back, or remove the folder and run again."
                )
            write_values(self.folder, ids, np.stack([vectors[i] for i in ids]), constants)
        _replace(self.folder / "predictions.jsonl", "".join(map(to_line, ordered)))
        record = _read_record(self.folder / "run.json") | {"rows": len(ordered)}
        if record["finished"] is None and len(ordered) >= record["target"]:
            record["finished"] = _now()
        _write_record(self.folder, record)
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)  # the merged file's name must be on the disk before the parts go
        os.close(folder)
        for file in parts:
            os.unlink(file.name)
            part_values(Path(file.name)).unlink(missing_ok=True)
            file.close()
        return ordered

    def _part_files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.jsonl"))

    def _open_part(self) -> None:
        """Take the first part file that no living process holds: its torn last line goes, its rows are known."""
        self._lock_byte(FOLDER_LOCK, wait=True)
        try:
            with self._guard:  # a reader that closed this file would drop its lock where NFS emulates flock
                number = 0
                while (file := _lock_file(self.folder / f"part-{number}.jsonl")) is None:
                    number += 1
                if self.width:
                    mend_part(file, self.width)
                    self._part_values = open(part_values(Path(file.name)), "ab")  # noqa: SIM115 - until `finish`
                rows, whole = _rows_from(Path(file.name), 0, file.read())
                file.truncate(whole)
                file.seek(whole)
                self.done.update(row.example_id for row in rows)
                self._part = file
        finally:
            self._unlock_byte(FOLDER_LOCK)

    def _read_new_rows(self) -> None:
        """Learn which ids have rows by now, in the merged file and in everybody's parts."""
        with self._guard:
            merged, own = self.folder / "predictions.jsonl", self._part and Path(self._part.name)
            seen = (merged.stat().st_ino, merged.stat().st_mtime_ns) if merged.exists() else None
            if seen != self._merged:  # parts were merged and removed: a new one may have an old one's inode
                self._offsets.clear()
                self._merged = seen
            for file in [merged, *self._part_files()]:
                if file == own:
                    continue
                try:
                    stat = file.stat()
                    inode, offset = self._offsets.get(file, (stat.st_ino, 0))
                    offset = offset if inode == stat.st_ino and stat.st_size >= offset else 0
                    if stat.st_size > offset:
                        rows, offset = _rows_from(file, offset)
                        self.done.update(row.example_id for row in rows)
                        self._offsets[file] = (stat.st_ino, offset)
                except FileNotFoundError:  # merged by another process since it was listed
                    continue

    def _lock_byte(self, byte: int, wait: bool = False, kind: int = fcntl.LOCK_EX) -> bool:
        try:
            fcntl.lockf(self._locks, kind | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise UserError(
                f"{self.folder} is on a file system without locks ({error}): choose another --out."
            ) from None
        return True

    def _unlock_byte(self, byte: int) -> None:
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, byte)


def open_run(folder: Path, config: dict[str, Any], order: Sequence[str], width: int = 0) -> Run:
    """Open or continue the run in `folder`; `order` is the list of example ids in evaluation order.

    `width`: length of the vector that goes with every row; 0: none.

    A run without a row, of a command that failed, gives way to one of another configuration or fewer rows.
    Raises UserError when the folder holds a run of another configuration (the difference is shown) or rows that cannot
    be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, order, width)
    run._lock_byte(FOLDER_LOCK, wait=True)
    try:
        file, session = folder / "run.json", {"versions": versions(), "git_commit": git_commit()}
        record = _read_record(file) if file.exists() else None
        if record is not None and _gives_way(record, config, order, folder) and run._lock_byte(ALIVE):  # nobody is here
            for part in run._part_files():
                part_values(part).unlink(missing_ok=True)
                part.unlink()
            (folder / VALUES).unlink(missing_ok=True)
            record = None
        run._lock_byte(ALIVE, kind=fcntl.LOCK_SH)
        if record is not None:
            _refuse_difference(folder, record["config"], config)
            record["config"] |= {key: config[key] for key in LATER if key in config}
            for part in filter(None, map(_lock_file, run._part_files() if width else ())):
                mend_part(part, width)  # not before: another run's parts would be cut by this run's width
                part.close()
        run._read_new_rows()
        if record is None and run.done:
            raise UserError(f"{folder} holds rows but no run.json to say what they are: move the folder away.")
        if record is None:
            record = {"config": config, "started": _now(), "finished": None, "rows": 0, "target": 0, "sessions": []}
        if len(order) > record["target"]:  # a larger limit goes on; a smaller one does not shrink the run
            record |= {"config": config, "target": len(order), "finished": None}
        if not run.complete:
            record.pop("not_applicable", None)
            if session not in record["sessions"]:
                record["sessions"].append(session)
        _write_record(folder, record)
    finally:
        run._unlock_byte(FOLDER_LOCK)
    return run


def pending_together(
    runs: Sequence[Run], batch_size: int, last: Collection[str] = ()
) -> Iterator[list[list[str]]]:  # fmt: skip
    """As `Run.pending` for several runs over the same order: of every lease the ids that each run still wants.

    So several questions about a picture can share what they have in common.
    """
    order = runs[0].order
    todo = {start: order[start : start + batch_size] for start in range(0, len(order), batch_size)}
    if last:
        todo = dict(sorted(todo.items(), key=lambda lease: all(i in last for i in lease[1])))
    while todo:
        for start, ids in list(todo.items()):
            held = list(itertools.takewhile(lambda run: run._lock_byte(start), runs))  # noqa: B023 - used at once
            if len(held) < len(runs):  # another process works on it
                for run in held:
                    run._unlock_byte(start)
                continue
            left = [run._lease(start, ids) for run in runs]
            if any(left):
                yield left
            del todo[start]
        if todo:
            time.sleep(0.2)
            for run in runs:
                run._read_new_rows()
            todo = {start: ids for start, ids in todo.items() if not all(run.done.issuperset(ids) for run in runs)}


def read_record(folder: Path) -> dict[str, Any]:
    """The record (run.json) of a run folder. Raises UserError when it cannot be read."""
    return _read_record(folder / "run.json")


def read_run(folder: Path) -> tuple[dict[str, Any], list[Prediction]]:
    """The record (run.json) and the merged rows of a run folder. Raises UserError when either cannot be read."""
    rows = folder / "predictions.jsonl"
    return read_record(folder), _rows_from(rows, 0)[0] if rows.exists() else []


def recorded(folder: Path, config: dict[str, Any]) -> list[Prediction]:
    """The rows that a run of this configuration has so far, merged or not; nothing is made, locked or changed.

    Raises UserError as `open_run` does.
    """
    if not (folder / "run.json").exists() or not has_rows(folder):
        return []
    _refuse_difference(folder, read_record(folder)["config"], config)
    files = [folder / "predictions.jsonl", *sorted(folder.glob("part-*.jsonl"))]
    rows = {row.example_id: row for file in files if file.exists() for row in _rows_from(file, 0)[0]}
    return list(rows.values())


def has_rows(folder: Path) -> bool:
    """Whether a run has a row already, merged or not."""
    files = [folder / "predictions.jsonl", *folder.glob("part-*.jsonl")]
    return any(b"\n" in file.read_bytes() for file in files if file.exists())


def _gives_way(record: dict[str, Any], config: dict[str, Any], order: Sequence[str], folder: Path) -> bool:
    """Whether a run is that of a command that failed before its first row, and another one is wanted now."""
    another = _differences(record["config"], config) or len(order) < record["target"]
    return bool(another) and "not_applicable" not in record and not has_rows(folder)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if key not in EXTENDABLE and (key in old or key not in LATER)]
    return [key for key in keys if old.get(key) != new.get(key)]


def _refuse_difference(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    if keys := _differences(old, new):
        shown = "; ".join(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} now" for key in keys)
        raise UserError(
            f"{folder} holds a run of another configuration ({shown}): remove it, or choose another one (--out)."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return {"config": {}, "finished": None, "rows": 0, "target": 0, "sessions": []} | record
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): mend it or move the run folder away.") from None


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    _replace(folder / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _rows_from(file: Path, offset: int, data: bytes | None = None) -> tuple[list[Prediction], int]:
    """Whole rows after byte `offset`, and the offset behind the last of them: a torn last line is not read."""
    if data is None:
        with open(file, "rb") as stream:
            stream.seek(offset)
            data = stream.read()
    whole = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            rows.append(prediction_from_line(line.decode()))
        except ValueError:
            place = f"row {number}" if offset == 0 else f"row {number} after byte {offset}"
            raise UserError(f"{file} {place} is not a prediction: remove that line and run again.") from None
    return rows, offset + whole


def _lock_file(path: Path) -> Any:
    """The file, opened (made where absent) and locked for as long as it is open; None when another process holds it."""
    file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _replace(file: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old or the new one; one that is the same already is left alone."""
    if file.exists() and file.read_bytes() == text.encode():
        return
    temporary = file.with_name(f".{file.name}.new")  # one name is enough: every caller holds the folder's lock
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
