"""Feature shards: arrays of every example in safetensors files, which are written once and memory-mapped when read.

A lease is a range of SHARD_ROWS examples of the order; its shard is renamed into place when it is complete, so that no
step holds or copies the whole, and the files are the same whatever was interrupted. The header of a shard says which
examples it holds, with their labels.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmclassifier.records import Example, UserError
from vlmclassifier.runs.record import now, read_record, write_record
from vlmclassifier.runs.store import Run, open_run

if TYPE_CHECKING:
    from torch import Tensor

SHARD_ROWS = 256  # examples of one shard: what a kill can lose, and what one process computes at a time
PATTERN = "features-*.safetensors"


class FeatureRun(Run):
    """A run of features. `pending` deals out ranges of SHARD_ROWS examples, `write_shard` records one."""

    def read_new_rows(self) -> None:
        """Learn which examples have features by now, in the shards of all processes."""
        with self._guard:
            for shard in sorted(self.folder.glob(PATTERN)):
                stat = shard.stat()
                if self._offsets.get(shard) == (stat.st_ino, stat.st_size):
                    continue
                try:
                    rows = read_header(shard)
                except UserError as error:
                    print(f"{error} Its features are computed again.", file=sys.stderr)
                    shard.unlink(missing_ok=True)
                    continue
                self._check_labels(rows)
                self.done.update(row.example_id for row in rows)
                self._offsets[shard] = (stat.st_ino, stat.st_size)

    def write_shard(self, examples: Sequence[Example], features: "Mapping[str, Tensor]") -> None:
        """Write the features [examples, width] of one lease under their names; then the lease ends."""
        from safetensors.torch import save_file

        first = self.order.index(examples[0].id)
        shard = self.folder / f"features-{first:08}.safetensors"
        rows = [[example.id, example.label, example.class_index] for example in examples]
        new = shard.with_name(f".{shard.name}.{os.getpid()}")
        tensors = {name: tensor.contiguous() for name, tensor in features.items()}
        save_file(tensors, new, metadata={"rows": json.dumps(rows, ensure_ascii=False)})
        with open(new, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(new, shard)
        ids = {example.id for example in examples}
        with self._guard:
            self.done |= ids
            for start in list(self._leases):
                self._leases[start] -= ids
                if not self._leases[start]:
                    del self._leases[start]
                    self.locks.release(start)

    def finish_features(self) -> None:
        """Note in run.json that the run is finished, where every example of the order has features."""
        with self.locks.whole_folder():
            self.read_new_rows()
            record = read_record(self.folder) | {"rows": len(self.done)}
            if record["finished"] is None and self.complete:
                record["finished"] = now()
            write_record(self.folder, record)
        self.locks.close()


def open_features(
    folder: Path, config: dict[str, Any], order: Sequence[str], labels: Mapping[str, str], batch_size: int
) -> FeatureRun:
    """Open or continue a run of features. Raises UserError as `open_run`."""
    return open_run(folder, config, order, labels=labels, batch_size=batch_size, run_class=FeatureRun)


class FeatureRow(NamedTuple):
    """What a shard's header says of one example."""

    example_id: str
    label: str
    class_index: int


def read_header(shard: Path) -> list[FeatureRow]:
    """The rows of a shard, without its features. Raises UserError for a truncated or damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as stored:
            return [FeatureRow(*row) for row in json.loads(stored.metadata()["rows"])]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The shard {shard} cannot be read ({error}): it is truncated or damaged.") from None


class Features:
    """The stored features of a finished run: `rows` in the order of the shards, `batches` streams one feature.

    The shards are memory-mapped: what is not looked at is not read. Raises UserError for a run that is no finished run
    of features, and for a shard that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        record = read_record(folder)
        self.folder, self.config = folder, record["config"]
        if self.config.get("kind") != "features":
            raise UserError(f"{folder} is no run of feature_analysis/extract_features.py: name the folder of one.")
        if record["finished"] is None:
            raise UserError(f"{folder} is unfinished: repeat the command of extract_features.py that made it.")
        self.shards = sorted(folder.glob(PATTERN))
        self.rows: list[FeatureRow] = []
        self._kept: list[list[int]] = []  # of every shard: the positions of the rows that no earlier shard has
        known: set[str] = set()
        for shard in self.shards:
            header = read_header(shard)
            kept = [position for position, row in enumerate(header) if row.example_id not in known]
            self._kept.append(kept)
            self.rows += [header[position] for position in kept]
            known |= {row.example_id for row in header}

    def layer_names(self) -> list[str]:
        """The features of single layers. Raises UserError for a run without them."""
        from safetensors import safe_open

        with safe_open(self.shards[0], framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith("layer_")]  # noqa: SIM118 - it is no dict
        if not names:
            raise UserError(f"{self.folder} has no features of single layers: extract them with --layers all.")
        return sorted(names, key=lambda name: (int(name.split("_")[1].split(".")[0]), name))

    def batches(self, name: str) -> "Iterator[Tensor]":
        """One feature of all rows, shard by shard: [rows of the shard, width] in the stored dtype.

        Raises UserError for a feature that the run does not have, and for one that is not finite: its example is named.
        """
        from safetensors import safe_open

        start = 0
        for shard, kept in zip(self.shards, self._kept, strict=True):
            with safe_open(shard, framework="pt") as stored:
                names = sorted(stored.keys())
                if name not in names:
                    raise UserError(f"{self.folder} has no feature {name!r}: it has {', '.join(names)}.")
                values = stored.get_tensor(name)[kept]  # [rows, width]
            finite = values.isfinite().all(dim=1)
            if not finite.all():
                row = self.rows[start + int((~finite).nonzero()[0])]
                raise UserError(
                    f"{shard}: the feature {name!r} of {row.example_id} is not finite: remove the shard and extract "
                    "again with --dtype bfloat16 or float32."
                )
            start += len(kept)
            yield values

    def load(self, name: str) -> "Tensor":
        """One feature of all rows [rows, width] in the stored dtype, in memory."""
        import torch

        return torch.cat(list(self.batches(name)))
