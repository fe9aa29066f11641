"""Names scored one by one: the definition that the tree is checked against, and what it falls back to."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmclassifier.ranking.decoding import gathered
from vlmclassifier.vlm import VLM

Tokens = Sequence[tuple[Tensor, Tensor]]  # of each name those that are fed and those that are read, both [tokens]


@torch.inference_mode()
def whole_passes(vlm: VLM, row: Mapping[str, Tensor], names: Tokens) -> np.ndarray:
    """One forward pass over picture, prompt and name for each name, nothing cached; float32 [names].

    `row`: what `VLM.prepare` made of one picture, so without padding, or a text alone.
    """
    start, sums = row["input_ids"].shape[1], []
    network = vlm.model
    if "pixel_values" not in row and hasattr(network, "qformer"):
        network = network.language_model  # the BLIPs' own forward insists on a picture
    for fed, read in names:
        outputs = network(**_with_name(vlm, row, fed[:-1]), use_cache=False)
        logits = outputs.logits[0, start - 1 : start - 1 + len(read)].float()  # [tokens, vocabulary]
        sums.append(gathered(logits, torch.arange(len(read), device=read.device), read).sum().item())
    return np.array(sums, dtype=np.float32)


@torch.inference_mode()
def behind_the_cache(
    vlm: VLM, row: Mapping[str, Tensor], names: Tokens, token_by_token: bool = False
) -> np.ndarray:  # fmt: skip
    """Name by name behind the cached prompt, whose cache is cut back after each; float32 [names].

    `token_by_token`: a forward pass for every token, as the reference does. Raises ValueError for the BLIPs, whose
    forward passes begin with a picture.
    """
    model, length, sums = vlm.model, row["input_ids"].shape[1], []
    if hasattr(model, "qformer"):
        raise ValueError("the BLIPs' forward passes begin with a picture")
    first = model(**row, use_cache=True, logits_to_keep=1)
    for fed, read in names:
        cache, logits = _fresh(first.past_key_values, length), [first.logits[0, -1:]]
        step = 1 if token_by_token else max(1, len(fed) - 1)
        for start in range(0, len(fed) - 1, step):
            tokens = fed[None, start : min(start + step, len(fed) - 1)]  # [1, step]
            mask = row["attention_mask"].new_ones((1, length + start + tokens.shape[1]))
            outputs = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits.append(outputs.logits[0])
        together = torch.cat(logits).float()  # [tokens, vocabulary]
        sums.append(gathered(together, torch.arange(len(read), device=read.device), read).sum().item())
    return np.array(sums, dtype=np.float32)


def _fresh(cache: Any, length: int) -> Any:
    """The cache of the prompt alone: cut back where all of it grows by token, else a copy (windows, recurrences)."""
    layers = getattr(cache, "layers", [])
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return copy.deepcopy(cache)
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return cache


def _with_name(vlm: VLM, row: Mapping[str, Tensor], fed: Tensor) -> dict[str, Tensor]:
    """The inputs of one picture with the tokens of a name behind the prompt."""
    longer = dict(row) | {"input_ids": torch.cat([row["input_ids"], fed[None]], dim=1)}
    # PaliGemma reads its prompt in both directions (0) and its answer in one (1); elsewhere 0 is text.
    answer = int(vlm.model.config.model_type == "paligemma")
    for key, value in (("attention_mask", 1), ("token_type_ids", answer), ("mm_token_type_ids", 0)):
        if key in row:
            longer[key] = torch.cat([row[key], torch.full_like(fed, value)[None]], dim=1)
    return longer
