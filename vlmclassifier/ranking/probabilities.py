"""The probabilities of class names for one image, in one line of Python."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmclassifier.class_lists import indistinct_warning, same_for_model
from vlmclassifier.images import as_images
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.ranking.ranker import Ranker
from vlmclassifier.records import UserError
from vlmclassifier.vlm import VLM


def rank_names(
    vlm: VLM, image: Image.Image | str | Path, names: Sequence[str], wording: str = "base"
) -> dict[str, float]:  # fmt: skip
    """Name -> probability, likeliest first: the softmax of log p(name | image, prompt) over the names, from one pass.

    The probabilities sum to 1 over the names given, and are not calibrated. A name's end is not scored: one that begins
    another ("cat", "cat food") is never less likely than it. Raises UserError for fewer than two names.
    """
    stripped = [name.strip() for name in ([names] if isinstance(names, str) else names)]
    different = list(dict.fromkeys(name for name in stripped if name))
    if len(different) < 2:
        raise UserError("One name alone always has probability 1: give at least two different names.")
    (opened,) = as_images(image)
    ranker = Ranker(vlm, different, WORDINGS[wording])
    ranker.select_method(opened)
    if groups := same_for_model(different, ranker.tokens.ids):
        print(indistinct_warning(groups, vlm.spec.key), file=sys.stderr)
    log_probs = ranker.log_probs([opened])[0].astype(np.float64)  # [names]
    scores = np.exp(log_probs - log_probs.max())
    order = np.argsort(-scores, kind="stable")
    return {different[place]: float(scores[place] / scores.sum()) for place in order}
