"""Which device and number format a model runs in, and batches that fit into its memory."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from vlmclassifier.records import UserError

T = TypeVar("T")
U = TypeVar("U")


def resolve_device(device: str) -> str:
    """The torch device of --device: "auto" and "cuda" are this process's GPU (LOCAL_RANK under a launcher).

    "auto" without a GPU is the CPU. Raises UserError where a GPU is asked for and torch sees none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu.")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device == "auto":
        return "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device: write auto, cpu, cuda or cuda:N.") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"{device} is not there: torch sees {torch.cuda.device_count()} GPUs, numbered from 0; mend --device or "
            "start fewer processes."
        )
    return str(place)


def resolve_dtype(dtype: str, device: str) -> str:
    """The name of the torch dtype of --dtype: "auto" is bfloat16 on a GPU and float32 on the CPU."""
    return ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype


class Halving:
    """Runs batches; where one does not fit into the device's memory, it and all later ones run in smaller parts."""

    def __init__(self) -> None:
        self.size: int | None = None  # rows that are known to fit; None: whatever comes

    def __call__(self, work: Callable[[Sequence[T]], Sequence[U]], rows: Sequence[T]) -> list[U]:
        """`work(rows)`, in one part or several. Raises UserError when not even one row fits."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            size = min(self.size or len(rows), len(rows))
            try:
                return [one for start in range(0, len(rows), size) for one in work(rows[start : start + size])]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            clear_device_cache(garbage_collection=True)  # behind the handler: its traceback holds the batch's tensors
            if size == 1:
                raise UserError(
                    "Not even one picture fits into the memory: use a smaller model, --dtype bfloat16, or fewer "
                    "--max-new-tokens."
                )
            self.size = -(-size // 2)
            print(f"out of memory at {size} pictures: going on with {self.size}, no row is lost", file=sys.stderr)
