"""Feature shards: arrays of every example in safetensors files, which are written once and memory-mapped when read.

A lease is a range of SHARD_ROWS examples of the order; its shard is renamed into place when it is complete, so that no
step holds or copies the whole, and the files are the same whatever was interrupted. The header of a shard says which
examples it holds, with their labels; the index, written at the end, says where each example of the order is.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmclassifier.records import Example, UserError
from vlmclassifier.runs.provenance import ids_hash
from vlmclassifier.runs.record import now, read_record, replace_file, write_record
from vlmclassifier.runs.store import Run, open_run

if TYPE_CHECKING:
    from torch import Tensor

SHARD_ROWS = 256  # examples of one shard: what a kill can lose, and what one process computes at a time
PATTERN = "features-*.safetensors"
INDEX = "rows.jsonl"  # one line per example: id, label, class index, shard, row of the shard
CONSTANTS = "constants.safetensors"  # tensors of the whole run, such as CLIP's class features


class FeatureRow(NamedTuple):
    """What a shard's header says of one example."""

    example_id: str
    label: str
    class_index: int


class FeatureRun(Run):
    """A run of features. `pending` deals out ranges of SHARD_ROWS examples, `write_shard` records one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._number = {example_id: number for number, example_id in enumerate(self.order)}
        self._places: dict[str, tuple[FeatureRow, str, int]] = {}  # id -> its row, shard and row of the shard

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
                for position, row in enumerate(rows):
                    self._places.setdefault(row.example_id, (row, shard.name, position))
                self._offsets[shard] = (stat.st_ino, stat.st_size)

    def write_shard(self, examples: Sequence[Example], features: "Mapping[str, Tensor]") -> None:
        """Write the features [examples, width] of one lease under their names; then the lease ends."""
        from safetensors.torch import save_file

        rows = [[example.id, example.label, example.class_index] for example in examples]
        digest = ids_hash([example.id for example in examples])
        # Named by its examples: after a change of the manifest no shard takes another's place.
        shard = self.folder / f"features-{self._number[examples[0].id]:08}-{digest[:8]}.safetensors"
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

    def write_constants(self, constants: "Mapping[str, Tensor]") -> None:
        """Write tensors of the whole run beside the shards."""
        from safetensors.torch import save_file

        with self.locks.whole_folder():
            new = self.folder / f".{CONSTANTS}.new"
            save_file({name: tensor.contiguous() for name, tensor in constants.items()}, new)
            os.replace(new, self.folder / CONSTANTS)

    def finish_features(self) -> None:
        """Write the index of all examples; the run is finished where every one of the order has features."""
        with self.locks.whole_folder():
            self.done.clear()
            self._places.clear()
            self._offsets.clear()
            self.read_new_rows()
            ordered = [self._places.pop(i) for i in self.order if i in self._places] + list(self._places.values())
            lines = [json.dumps([*row, shard, place], ensure_ascii=False) for row, shard, place in ordered]
            replace_file(self.folder / INDEX, "\n".join(lines) + "\n" if lines else "")
            record = read_record(self.folder) | {"rows": len(ordered)}
            if record["finished"] is None and self.complete:
                record["finished"] = now()
            write_record(self.folder, record)
        self.locks.close()


def open_features(
    folder: Path, config: dict[str, Any], order: Sequence[str], labels: Mapping[str, str], batch_size: int
) -> FeatureRun:
    """Open or continue a run of features. Raises UserError as `open_run`."""
    return open_run(folder, config, order, labels=labels, batch_size=batch_size, run_class=FeatureRun)


def open_shard(shard: Path) -> Any:
    """A shard by safetensors' `safe_open`. Raises UserError for a truncated, damaged or missing one."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(shard, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The shard {shard} cannot be read ({error}): it is truncated or damaged; extract_features.py computes "
            "its features again."
        ) from None


def read_header(shard: Path) -> list[FeatureRow]:
    """The rows of a shard, without its features. Raises UserError for a truncated or damaged one."""
    with open_shard(shard) as stored:
        try:
            return [FeatureRow(*row) for row in json.loads(stored.metadata()["rows"])]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"The shard {shard} has no list of its rows ({error!r}): it is damaged.") from None


class Matrix:
    """Rows of one feature, [rows, width], in memory or in mapped shards; rows are copied when they are indexed.

    `parts`: tensors [rows of the part, width]; row i is row `position[i]` of `parts[part_of[i]]`.
    """

    def __init__(self, parts: "Sequence[Tensor]", part_of: "Tensor", position: "Tensor") -> None:
        self.parts, self.part_of, self.position = parts, part_of, position

    @classmethod
    def of(cls, values: "Tensor") -> "Matrix":
        """The matrix of a tensor [rows, width]."""
        import torch

        return cls([values], torch.zeros(len(values), dtype=torch.long), torch.arange(len(values)))

    def __len__(self) -> int:
        return len(self.part_of)

    @property
    def width(self) -> int:
        """Numbers per row."""
        return self.parts[0].shape[1]

    def subset(self, rows: "Tensor") -> "Matrix":
        """Some of the rows, by indices or a mask [rows]; nothing is copied."""
        return Matrix(self.parts, self.part_of[rows], self.position[rows])

    def __getitem__(self, rows: "Tensor | slice") -> "Tensor":
        """A copy of some rows [rows, width] in the stored dtype, on the device of the parts."""
        part_of, position = self.part_of[rows], self.position[rows]
        if len(self.parts) == 1:
            return self.parts[0][position.to(self.parts[0].device)]
        values = self.parts[0].new_empty((len(part_of), self.width))
        for part in part_of.unique().tolist():
            found = (part_of == part).nonzero()[:, 0]
            values[found] = self.parts[part][position[found]]
        return values

    def batches(self, size: int) -> "Iterator[Tensor]":
        """All rows in order, in float32 batches [size, width]."""
        for start in range(0, len(self), size):
            yield self[start : start + size].float()

    def on_device(self, device: str) -> "Matrix":
        """The matrix with its rows on a GPU, if they take less than a quarter of its free memory; else unchanged.

        On the CPU the shards stay mapped: the pages that are read are not the process's own memory.
        """
        import torch

        size = len(self) * self.width * self.parts[0].element_size()
        if not device.startswith("cuda") or size > torch.cuda.mem_get_info(device)[0] / 4:
            return self
        values = torch.empty((len(self), self.width), dtype=self.parts[0].dtype, device=device)
        for start in range(0, len(self), SHARD_ROWS):
            values[start : start + SHARD_ROWS] = self[start : start + SHARD_ROWS].to(device)
        return Matrix.of(values)


class Features:
    """The stored features of a finished run: `rows` in the evaluation order, `matrix` one feature of them.

    Raises UserError for a run that is no finished run of features.
    """

    def __init__(self, folder: Path) -> None:
        record = read_record(folder)
        self.folder, self.config = folder, record["config"]
        if self.config.get("kind") != "features":
            raise UserError(f"{folder} is no run of feature_analysis/extract_features.py: name the folder of one.")
        if record["finished"] is None or not (folder / INDEX).exists():
            raise UserError(f"{folder} is unfinished: repeat the command of extract_features.py that made it.")
        lines = (folder / INDEX).read_text(encoding="utf-8").splitlines()[: record["target"]]
        entries = [json.loads(line) for line in lines]
        self.rows = [FeatureRow(*entry[:3]) for entry in entries]
        names = list(dict.fromkeys(entry[3] for entry in entries))
        number = {name: place for place, name in enumerate(names)}
        self.shards = [folder / name for name in names]
        self._part_of = [number[entry[3]] for entry in entries]  # [rows]
        self._position = [entry[4] for entry in entries]  # [rows]
        self._stored: dict[Path, Any] = {}  # the opened shards: one mapping of each file, whatever is read
        self._matrices: dict[str, Matrix] = {}  # those that are known to be finite

    def _shard(self, shard: Path) -> Any:
        if shard not in self._stored:
            self._stored[shard] = open_shard(shard)
        return self._stored[shard]

    @property
    def names(self) -> list[str]:
        """The features that every example has."""
        return sorted(self._shard(self.shards[0]).keys())

    @cached_property
    def rows_hash(self) -> str:
        """A hash of the examples in their order."""
        return ids_hash([row.example_id for row in self.rows])

    def width(self, name: str) -> int:
        """Numbers per row of a feature. Raises UserError for one that the run does not have."""
        self._check_name(name)
        return self._shard(self.shards[0]).get_slice(name).get_shape()[1]

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise UserError(f"{self.folder} has no feature {name!r}: it has {', '.join(self.names)}.")

    def layer_names(self) -> list[str]:
        """The features of single layers, of the vision encoder first. Raises UserError for a run without them."""
        names = [name for name in self.names if name.startswith("layer_")]
        if not names:
            raise UserError(f"{self.folder} has no features of single layers: extract them with --layers all.")
        places = ("vision", "projector")  # before the numbers

        def depth(name: str) -> tuple[int, str]:
            layer = name.removeprefix("layer_").split(".")[0]
            return (places.index(layer) - len(places) if layer in places else int(layer), name)

        return sorted(names, key=depth)

    def matrix(self, name: str) -> Matrix:
        """One feature of all rows, memory-mapped.

        Raises UserError for a feature that the run does not have, for a damaged shard, and for a feature that is not
        finite: its examples are named.
        """
        import torch

        if name in self._matrices:
            return self._matrices[name]
        self._check_name(name)
        parts = [self._shard(shard).get_tensor(name) for shard in self.shards]  # each [rows of the shard, width]
        matrix = Matrix(parts, torch.tensor(self._part_of), torch.tensor(self._position))
        broken = [
            start + int(row) for start in range(0, len(matrix), SHARD_ROWS)
            for row in (~matrix[start : start + SHARD_ROWS].isfinite().all(dim=1)).nonzero()
        ]  # fmt: skip
        if broken:
            ids = [self.rows[row].example_id for row in broken]
            raise UserError(
                f"{self.shards[self._part_of[broken[0]]]}: the feature {name!r} is not finite for {', '.join(ids[:5])}"
                f"{f' and {len(ids) - 5} other images' if len(ids) > 5 else ''}: remove the shard and extract again "
                "with --dtype bfloat16 or float32."
            )
        self._matrices[name] = matrix
        return matrix

    def constant(self, name: str) -> "Tensor | None":
        """A tensor of the whole run, or None."""
        if not (self.folder / CONSTANTS).exists():
            return None
        with open_shard(self.folder / CONSTANTS) as stored:
            return stored.get_tensor(name) if name in stored.keys() else None  # noqa: SIM118 - it is no dict
