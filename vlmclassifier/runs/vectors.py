"""The numbers that go with the rows of a run: one float32 vector per row, in VALUES beside predictions.jsonl.

While a run goes on, every part-N.jsonl has a part-N.f32 with the vectors of its rows in the same order.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vlmclassifier.records import UserError

if TYPE_CHECKING:
    from numpy import ndarray

VALUES = "values.safetensors"
ROWS = "values"  # the tensor of the rows; any other tensor is a constant of the run


def shard_vectors(shard: Path) -> Path:
    """The file of the vectors of part-N.jsonl."""
    return shard.with_suffix(".f32")


def read_shard(shard: Path, count: int, width: int) -> "ndarray":
    """The first `count` vectors of a part: float32 [count, width]."""
    import numpy as np

    return np.fromfile(shard_vectors(shard), dtype=np.float32, count=count * width).reshape(count, width)


def truncate_torn_rows(shard: BinaryIO, width: int) -> None:
    """Cut off what a crash has torn from a part that no process writes: rows without a vector, vectors without a row.

    `shard`: part-N.jsonl, opened for reading and writing; its position is 0 afterwards.
    """
    file, size = shard_vectors(Path(shard.name)), 4 * width
    data = shard.read()
    rows = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    count = min(len(rows), file.stat().st_size // size if file.exists() else 0)
    shard.truncate(sum(len(row) for row in rows[:count]))
    shard.seek(0)
    with open(file, "ab") as stream:
        stream.truncate(count * size)


def read_values(folder: Path) -> tuple[list[str], dict[str, "ndarray"]]:
    """Example ids, and the tensors of a run folder; `values` is float32 [ids, width] in the order of the ids.

    Raises UserError when the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / VALUES
    try:
        with safe_open(file, framework="numpy") as stored:
            ids = json.loads(stored.metadata()["ids"])
            return ids, {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): remove the run folder and run again.") from None


def write_values(folder: Path, ids: Sequence[str], values: "ndarray", constants: Mapping[str, "ndarray"]) -> None:
    """Write VALUES so that a crash leaves either the old or the new one; an unchanged one is left alone."""
    import numpy as np
    from safetensors.numpy import save

    tensors = {key: np.ascontiguousarray(value) for key, value in constants.items()} | {ROWS: values}
    data, file = save(tensors, metadata={"ids": json.dumps(list(ids))}), folder / VALUES
    if file.exists() and file.read_bytes() == data:
        return
    temporary = file.with_name(f".{VALUES}.new")
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
