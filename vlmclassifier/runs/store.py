"""A run folder {run.json, predictions.jsonl}, safe against crashes and shared by any number of processes.

Every process appends its rows to a part file of its own and works in leases of one batch (two are held while the next
one is prefetched). A lease is an advisory lock on one byte of `.lock` (`locks.py`); the rows are the only record of
what is done. So the same command can be started as often as needed, at the same time or after a crash: the processes
share the work, and the last one to finish merges the parts in the evaluation order. A run may keep a float32 vector
with every row (`vectors.py`).
"""

import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier.records import Prediction, UserError, prediction_from_line, to_line
from vlmclassifier.runs.locks import ALIVE_BYTE, FolderLocks, open_locked
from vlmclassifier.runs.provenance import git_commit, versions
from vlmclassifier.runs.record import (
    NOTE_KEYS,
    OPTIONAL_KEYS,
    ROWS_KEYS,
    differing_keys,
    new_record,
    now,
    read_record,
    refuse_difference,
    replace_file,
    write_record,
)
from vlmclassifier.runs.vectors import (
    ROWS,
    VALUES,
    read_shard,
    read_values,
    shard_vectors,
    truncate_torn_rows,
    write_values,
)

if TYPE_CHECKING:
    from numpy import ndarray

    from vlmclassifier.runs.features import FeatureRow

ROWS_FILE = "predictions.jsonl"
IN_FLIGHT = 4  # batches that may be written but not yet on the disk


class Run:
    """One run: `pending` deals out work, `append` records rows, `finish` merges. Made by `open_run`."""

    def __init__(
        self, folder: Path, order: Sequence[str], width: int = 0, labels: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.order = list(order)
        self.labels = dict(labels or {})  # id -> label, where recorded rows are to be compared with it
        self.width = width  # of the vector that goes with every row; 0: none
        self.done: set[str] = set()
        self.locks = FolderLocks(folder)
        self._offsets: dict[Path, tuple[int, int]] = {}  # file -> (inode, bytes read)
        self._leases: dict[int, set[str]] = {}  # leases held -> ids still to be recorded
        self._merged: tuple[int, int] | None = None  # inode and time of ROWS_FILE when it was last read
        self._guard = threading.RLock()  # `pending` may run in a prefetch thread beside `append`
        self._shard: Any = None
        self._shard_vectors: Any = None
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._on_disk: deque[Future] = deque()  # one fsync per batch, oldest first

    @property
    def complete(self) -> bool:
        """Whether every example of the order has a row."""
        return self.done.issuperset(self.order)

    def pending(self, batch_size: int, last: Collection[str] = ()) -> Iterator[list[str]]:
        """Yield lists of example ids without a row that no other process works on, until every id has a row.

        `last`: ids that are left to the end. Waits at the end for other processes; a lease that its holder lost (by
        dying) is taken over. Processes of other batch sizes use other leases: they may compute a row twice, but the
        merged file has it once.
        """
        for (ids,) in pending_together([self], batch_size, last):
            yield ids

    def lease(self, start: int, ids: Sequence[str]) -> list[str]:
        """The ids of a lease, which this process has locked, that have no row yet; without any the lease ends."""
        self.read_new_rows()
        pending = [i for i in ids if i not in self.done]
        if pending:
            with self._guard:
                self._leases[start] = set(pending)
        else:
            self.locks.release(start)
        return pending

    def append(self, predictions: Sequence[Prediction], values: "ndarray | None" = None) -> None:
        """Write a batch of rows; they reach the disk (fsync) while the next batch is computed, then its lease ends.

        `values`: float32 [rows, width], where the run keeps vectors. A disk that is slow for a moment does not stop the
        run, one that lags by IN_FLIGHT batches is waited for; an error of the disk is raised here or in `finish`.
        """
        self._wait_for_disk(IN_FLIGHT - 1)
        if self._shard is None:
            self._open_shard()
        if self.width:  # before the rows, so that every row on the disk has its vector
            if values is None or values.shape != (len(predictions), self.width) or values.dtype != "float32":
                raise ValueError(f"every row needs a float32 vector of {self.width} numbers")
            self._shard_vectors.write(values.tobytes())
            self._shard_vectors.flush()
        self._shard.write("".join(to_line(prediction) for prediction in predictions).encode())
        self._shard.flush()
        ids = {prediction.example_id for prediction in predictions}
        with self._guard:
            self.done |= ids
        self._on_disk.append(self._disk.submit(self._sync, ids))

    def _sync(self, ids: set[str]) -> None:
        """Write the shard to the disk; end the leases whose ids are all recorded."""
        for file in (self._shard_vectors, self._shard):
            if file is not None:
                os.fsync(file.fileno())
        with self._guard:
            for start in list(self._leases):
                if self._leases[start] & ids:
                    self._leases[start] -= ids
                    if not self._leases[start]:
                        del self._leases[start]
                        self.locks.release(start)

    def _wait_for_disk(self, in_flight: int = 0) -> None:
        while self._on_disk and (len(self._on_disk) > in_flight or self._on_disk[0].done()):
            self._on_disk.popleft().result()

    def keep(self, constants: "Mapping[str, ndarray]") -> None:
        """Keep tensors of the whole run beside the rows' vectors, before the first row; stored ones stay."""
        import numpy as np

        with self.locks.whole_folder():
            ids, stored = read_values(self.folder) if (self.folder / VALUES).exists() else ([], {})
            values = stored.pop(ROWS, np.zeros((0, self.width), dtype=np.float32))
            write_values(self.folder, ids, values, dict(constants) | stored)

    def finish(self) -> list[Prediction]:
        """Merge the parts into predictions.jsonl in the evaluation order and return all its rows."""
        self._wait_for_disk()
        self._disk.shutdown()
        for file in (self._shard, self._shard_vectors):
            if file is not None:
                file.close()
        self._shard = self._shard_vectors = None
        with self.locks.whole_folder():
            merged = self._merge()
        self.locks.close()
        return merged

    def accept_unanswered(self) -> None:
        """End the run with the examples that have a row by now; a tag says how many have none.

        The command without this goes on with the others.
        """
        with self.locks.whole_folder():
            self.read_new_rows()
            answered = [i for i in self.order if i in self.done]
            if not answered or len(answered) == len(self.order):
                return
            record = read_record(self.folder)
            tag = f"{len(self.order) - len(answered)} of {len(self.order)} images unanswered"
            record["config"]["tags"] = [*record["config"]["tags"], tag]
            write_record(self.folder, record | {"target": len(answered)})
            self.order = answered

    def not_applicable(self, reason: str) -> None:
        """Note in run.json why this cell stays empty, for the tables."""
        with self.locks.whole_folder():
            write_record(self.folder, read_record(self.folder) | {"not_applicable": reason})

    def _merge(self) -> list[Prediction]:
        """One file of all rows in evaluation order; only parts that no living process writes are removed."""
        finished_shards = [file for file in map(open_locked, self.shard_files()) if file]
        rows: dict[str, Prediction] = {}
        vectors: dict[str, ndarray] = {}
        constants: dict[str, ndarray] = {}
        if self.width and (self.folder / VALUES).exists():
            ids, constants = read_values(self.folder)
            vectors = dict(zip(ids, constants.pop(ROWS), strict=True))
        for file in [self.folder / ROWS_FILE, *self.shard_files()]:
            found = parse_rows(file)[0] if file.exists() else []
            if self.width and found and file.name != ROWS_FILE:
                for row, vector in zip(found, read_shard(file, len(found), self.width), strict=True):
                    vectors.setdefault(row.example_id, vector)
            for prediction in found:
                rows.setdefault(prediction.example_id, prediction)
        ordered = [rows.pop(i) for i in self.order if i in rows] + list(rows.values())
        if self.width and ordered:  # before the rows: the file's own ids say which rows its vectors belong to
            self._write_vectors([row.example_id for row in ordered], vectors, constants)
        replace_file(self.folder / ROWS_FILE, "".join(to_line(row) for row in ordered))
        recorded = {row.example_id for row in ordered}
        record = read_record(self.folder) | {"rows": len(ordered)}
        if record["finished"] is None and len(ordered) >= record["target"] and recorded.issuperset(self.order):
            record["finished"] = now()
        write_record(self.folder, record)
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)  # the merged file's name must be on the disk before the parts go
        os.close(folder)
        for file in finished_shards:
            os.unlink(file.name)
            shard_vectors(Path(file.name)).unlink(missing_ok=True)
            file.close()
        return ordered

    def _write_vectors(self, ids: list[str], vectors: "dict[str, ndarray]", constants: "dict[str, ndarray]") -> None:
        import numpy as np

        if missing := [i for i in ids if i not in vectors]:
            raise UserError(
                f"{self.folder} has rows without their numbers (such as {missing[0]}): {VALUES} was removed or "
                "changed; put it back, or remove the folder and run again."
            )
        write_values(self.folder, ids, np.stack([vectors[i] for i in ids]), constants)

    def shard_files(self) -> list[Path]:
        """The part files of all processes."""
        return sorted(self.folder.glob("part-*.jsonl"))

    def _check_labels(self, rows: "Sequence[Prediction | FeatureRow]") -> None:
        """Raise UserError for a recorded row whose label is not the manifest's."""
        for row in rows:
            if (label := self.labels.get(row.example_id, row.label)) != row.label:
                raise UserError(
                    f"{self.folder} holds an answer about {row.example_id} with the label {row.label!r}, which is "
                    f"{label!r} in the manifest now: remove the folder, or choose another one (--out)."
                )

    def _open_shard(self) -> None:
        """Take the first part file that no living process holds: its torn last line goes, its rows count as done."""
        with self.locks.whole_folder(), self._guard:  # a reader closing this file would drop its lock on NFS
            number = 0
            while (file := open_locked(self.folder / f"part-{number}.jsonl")) is None:
                number += 1
            if self.width:
                truncate_torn_rows(file, self.width)
                self._shard_vectors = open(shard_vectors(Path(file.name)), "ab")  # noqa: SIM115 - until `finish`
            rows, whole = parse_rows(Path(file.name), 0, file.read())
            file.truncate(whole)
            file.seek(whole)
            self.done.update(row.example_id for row in rows)
            self._shard = file

    def read_new_rows(self) -> None:
        """Learn which ids have rows by now, in the merged file and in every process's part."""
        with self._guard:
            merged, own = self.folder / ROWS_FILE, self._shard and Path(self._shard.name)
            stamp = (merged.stat().st_ino, merged.stat().st_mtime_ns) if merged.exists() else None
            if stamp != self._merged:  # parts were merged and removed: a new one may have an old one's inode
                self._offsets.clear()
                self._merged = stamp
            for file in [merged, *self.shard_files()]:
                if file == own:
                    continue
                try:
                    stat = file.stat()
                    inode, offset = self._offsets.get(file, (stat.st_ino, 0))
                    offset = offset if inode == stat.st_ino and stat.st_size >= offset else 0
                    if stat.st_size > offset:
                        rows, offset = parse_rows(file, offset)
                        self._check_labels(rows)
                        self.done.update(row.example_id for row in rows)
                        self._offsets[file] = (stat.st_ino, offset)
                except FileNotFoundError:  # merged by another process since it was listed
                    continue


def open_run(
    folder: Path, config: dict[str, Any], order: Sequence[str], width: int = 0, *,
    labels: Mapping[str, str] | None = None, batch_size: int | None = None, run_class: type[Run] = Run,
) -> Run:  # fmt: skip
    """Open or continue the run in `folder`; `order` is the list of example ids in evaluation order.

    `width`: length of the vector that goes with every row; 0: none. `labels`: id -> label of the order. `batch_size`:
    is noted in run.json. A run without a row, of a command that failed, is replaced by one of another configuration or
    fewer rows. After a change of the manifest the run goes on with the new order: recorded rows outside of it are kept
    behind the others and not scored. Raises UserError when the folder holds a run of another configuration (the
    difference is shown), of other labels, of an older format, or rows that cannot be read.
    """
    if folder.is_file():
        raise UserError(f"--out {folder} is a file: give a folder for the run.")
    folder.mkdir(parents=True, exist_ok=True)
    run = run_class(folder, order, width, labels)
    with run.locks.whole_folder():
        record = read_record(folder) if (folder / "run.json").exists() else None
        if record is not None and _is_replaceable(record, config, order, folder) and run.locks.acquire(ALIVE_BYTE):
            _remove_shards(run)  # no other process has the run open
            record = None
        run.locks.acquire(ALIVE_BYTE, shared=True)
        if record is not None:
            refuse_difference(folder, record["config"], config)
            record["config"] |= {key: config[key] for key in (*OPTIONAL_KEYS, *NOTE_KEYS) if key in config}
            for shard in filter(None, map(open_locked, run.shard_files() if width else ())):
                truncate_torn_rows(shard, width)  # not before: another run's parts would be cut by this run's width
                shard.close()
        run.read_new_rows()
        if record is None and run.done:
            raise UserError(f"{folder} holds rows but no run.json to say what they are: move the folder away.")
        record = record or new_record(config)
        is_changed = any(record["config"].get(key) != config.get(key) for key in ROWS_KEYS)
        if len(order) > record["target"] or is_changed:  # a larger limit goes on; a smaller one does not shrink the run
            finished = record["finished"] if run.complete and is_changed else None
            record |= {"config": config, "target": len(order), "finished": finished}
        if not run.complete:
            record.pop("not_applicable", None)
            session = {"versions": versions(), "git_commit": git_commit()}
            session |= {} if batch_size is None else {"batch_size": batch_size}
            if session not in record["sessions"]:
                record["sessions"].append(session)
        write_record(folder, record)
    return run


def _is_replaceable(record: dict[str, Any], config: dict[str, Any], order: Sequence[str], folder: Path) -> bool:
    """Whether a run is that of a command that failed before its first row, and another one is wanted now."""
    another = differing_keys(record["config"], config) or len(order) < record["target"]
    return bool(another) and "not_applicable" not in record and not has_rows(folder)


def _remove_shards(run: Run) -> None:
    for shard in run.shard_files():
        shard_vectors(shard).unlink(missing_ok=True)
        shard.unlink()
    (run.folder / VALUES).unlink(missing_ok=True)


def pending_together(
    runs: Sequence[Run], batch_size: int, last: Collection[str] = ()
) -> Iterator[list[list[str]]]:  # fmt: skip
    """As `Run.pending` for several runs over the same order: for every lease the ids that each run still needs.

    So several questions about an image can share its features.
    """
    order = runs[0].order
    leases = {start: order[start : start + batch_size] for start in range(0, len(order), batch_size)}
    if last:
        leases = dict(sorted(leases.items(), key=lambda lease: all(i in last for i in lease[1])))
    while leases:
        for start, ids in list(leases.items()):
            if not _acquire_in_all(runs, start):  # another process works on it
                continue
            pending = [run.lease(start, ids) for run in runs]
            if any(pending):
                yield pending
            del leases[start]
        if leases:
            time.sleep(0.2)
            for run in runs:
                run.read_new_rows()
            leases = {
                start: ids for start, ids in leases.items() if not all(run.done.issuperset(ids) for run in runs)
            }  # fmt: skip


def _acquire_in_all(runs: Sequence[Run], start: int) -> bool:
    """Lock one lease in every run, or in none."""
    held: list[Run] = []
    for run in runs:
        if not run.locks.acquire(start):
            for other in held:
                other.locks.release(start)
            return False
        held.append(run)
    return True


def read_rows(folder: Path) -> list[Prediction]:
    """All merged rows of a run folder. Raises UserError when they cannot be read."""
    file = folder / ROWS_FILE
    return parse_rows(file)[0] if file.exists() else []


def read_run(folder: Path) -> tuple[dict[str, Any], list[Prediction]]:
    """The record and the evaluated rows of a run folder. Raises UserError when either cannot be read.

    Behind the evaluated rows the file may have others, which a change of the manifest has left out.
    """
    record = read_record(folder)
    rows = read_rows(folder)
    return record, rows[: record["target"]] if record["finished"] else rows


def recorded_rows(folder: Path, config: dict[str, Any]) -> list[Prediction]:
    """The rows that a run of this configuration has so far, merged or not; nothing is made, locked or changed.

    Raises UserError as `open_run` does.
    """
    if not (folder / "run.json").exists() or not has_rows(folder):
        return []
    refuse_difference(folder, read_record(folder)["config"], config)
    files = [folder / ROWS_FILE, *sorted(folder.glob("part-*.jsonl"))]
    rows = {row.example_id: row for file in files if file.exists() for row in parse_rows(file)[0]}
    return list(rows.values())


def has_rows(folder: Path) -> bool:
    """Whether a run has a row already, merged or not."""
    if any(folder.glob("features-*.safetensors")):
        return True
    files = [folder / ROWS_FILE, *folder.glob("part-*.jsonl")]
    return any(b"\n" in file.read_bytes() for file in files if file.exists())


def parse_rows(file: Path, offset: int = 0, data: bytes | None = None) -> tuple[list[Prediction], int]:
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
