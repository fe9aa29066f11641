"""The one check of the numbers that leave a model: the first that is not finite ends the run.

A NaN compares as neither larger nor smaller, so a ranking of NaN would name any class the best, and greedy decoding of
NaN yields some token: such numbers must end the run before a row is recorded.
"""

import torch
from torch import Tensor

from vlmclassifier.records import RowError


class NotFiniteError(RowError):
    """A number of a model is not finite."""


def check_finite(values: Tensor, what: str, dtype: torch.dtype, has_rows: bool = True) -> Tensor:
    """Return `values` [rows, ...], or raise NotFiniteError with the first row that is not finite in every number.

    `what`: names the numbers, such as "A logit". `dtype`: that of the model. `has_rows`: whether a row is an image.
    """
    finite = torch.isfinite(values)
    if finite.all():
        return values
    row = int((~finite).flatten(1).any(dim=1).nonzero()[0]) if has_rows else None
    advice = "use --dtype float32; if it stays so, the checkpoint is damaged"
    if dtype is torch.float16:
        advice = "use --dtype bfloat16 or float32"
    raise NotFiniteError(
        f"{what}{' of {image}' if has_rows else ''} is not a finite number in {str(dtype).removeprefix('torch.')}: "
        f"nothing of this batch is recorded; {advice}.",
        row,
    )
