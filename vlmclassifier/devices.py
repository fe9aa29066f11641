"""Devices, dtypes, and splitting batches that do not fit into the device's memory."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from vlmclassifier.records import UserError, rows_from

T = TypeVar("T")


def resolve_device(device: str) -> str:
    """The name of the torch device for --device.

    "auto" and "cuda" select the GPU of this process (LOCAL_RANK under a launcher); "auto" without a GPU selects the
    CPU. Raises UserError for an unknown device, and for a GPU that torch does not see.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no CUDA GPU on this machine; use --device cpu.")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device == "auto":
        return "cpu"
    try:
        torch_device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is not a device: use auto, cpu, cuda or cuda:N.") from None
    backend = getattr(torch, torch_device.type, None)  # of cpu, cuda, mps and xpu; "meta" has no numbers
    if not hasattr(backend, "is_available") or not backend.is_available():
        raise UserError(f"--device {device} is not a device that torch can use here: use auto, cpu, cuda or cuda:N.")
    if torch_device.type == "cuda" and (torch_device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"The device {device} does not exist: torch sees {torch.cuda.device_count()} GPUs, numbered from 0; fix "
            "--device or start fewer processes."
        )
    return str(torch_device)


def resolve_dtype(dtype: str, device: str) -> str:
    """The name of the torch dtype for --dtype: "auto" is bfloat16 on a GPU and float32 on the CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


class BatchSplitter:
    """Runs batches, and splits a batch that does not fit into the device's memory. Later batches are split too."""

    def __init__(self) -> None:
        self.size: int | None = None  # largest number of rows in one part; None: no batch was too large yet

    def run(self, work: Callable[[slice], Sequence[T]], count: int) -> list[T]:
        """The results of `work(part)` for all `count` rows, in one part or in several.

        Raises UserError when a single row does not fit.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            size = min(self.size or count, count)
            try:
                results: list[T] = []
                for start in range(0, count, size):
                    with rows_from(start):
                        results += work(slice(start, min(start + size, count)))
                return results
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Outside the exception handler, because its traceback keeps the tensors of the batch alive.
            clear_device_cache(garbage_collection=True)
            if size == 1:
                raise UserError(
                    "A single image does not fit into the device's memory: use a smaller model, --dtype bfloat16, or a "
                    "lower --max-new-tokens."
                )
            self.size = math.ceil(size / 2)
            print(f"out of memory at {size} images: continuing with {self.size}, no row is lost", file=sys.stderr)
