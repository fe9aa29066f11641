"""The one check of the numbers that leave a model: the first that is not finite ends the run.

A NaN compares as neither larger nor smaller, so a ranking of NaN would name any class the best, and greedy decoding of
NaN yields some token: such numbers must end the run before a row is recorded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vlmclassifier.records import UserError


class NotFiniteError(UserError):
    """A number of a model is not finite. `row`: the row of the batch; None where it belongs to no image."""

    def __init__(self, what: str, dtype: torch.dtype, row: int | None, image: str = "") -> None:
        self.what, self.dtype, self.row = what, dtype, row
        dtype_name = str(dtype).removeprefix("torch.")
        advice = "use --dtype bfloat16 or float32"
        if dtype is not torch.float16:
            advice = "use --dtype float32; if it stays so, the checkpoint is damaged"
        super().__init__(
            f"{what}{f' of {image}' if image else ''} is not a finite number in {dtype_name}: nothing of this batch is "
            f"recorded; {advice}."
        )


def check_finite(values: Tensor, what: str, dtype: torch.dtype, has_rows: bool = True) -> Tensor:
    """Return `values` [rows, ...], or raise NotFiniteError with the first row that is not finite in every number.

    `what`: names the numbers, such as "A logit". `dtype`: that of the model. `has_rows`: whether a row is an image.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return values
    row = int((~finite).flatten(1).any(dim=1).nonzero()[0]) if has_rows else None
    raise NotFiniteError(what, dtype, row)


@contextmanager
def rows_from(start: int) -> Iterator[None]:
    """Within it, row 0 of a NotFiniteError is row `start` of the caller's batch."""
    try:
        yield
    except NotFiniteError as error:
        row = None if error.row is None else error.row + start
        raise NotFiniteError(error.what, error.dtype, row) from None


@contextmanager
def images_named(ids: Sequence[str]) -> Iterator[None]:
    """Within it, a NotFiniteError names the image: the example id of its row."""
    try:
        yield
    except NotFiniteError as error:
        image = "" if error.row is None else ids[error.row]
        raise NotFiniteError(error.what, error.dtype, error.row, image) from None
