"""Log-probabilities of names, one name at a time: the reference for the tree, and the fallback."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmclassifier.ranking.decoding import token_log_probs
from vlmclassifier.vlm import VLM

NamePairs = Sequence[tuple[Tensor, Tensor]]  # of each name: input ids and target ids, both [tokens]


@torch.inference_mode()
def full_forward_log_probs(vlm: VLM, row: Mapping[str, Tensor], names: NamePairs) -> np.ndarray:
    """Summed log-probabilities float32 [names], by one forward pass over image, prompt and name for each name.

    `row`: the processor's output for one image without padding, or for a text alone, on the device.
    """
    start, sums = row["input_ids"].shape[1], []
    network = vlm.model
    if "pixel_values" not in row and hasattr(network, "qformer"):
        network = network.language_model  # the forward pass of BLIP-2 and InstructBLIP requires an image
    for input_ids, target_ids in names:
        outputs = network(**_append_name(vlm, row, input_ids[:-1]), use_cache=False)
        logits = outputs.logits[0, start - 1 : start - 1 + len(target_ids)].float()  # [tokens, vocabulary]
        sums.append(_summed_log_prob(logits, target_ids))
    return np.array(sums, dtype=np.float32)


@torch.inference_mode()
def cached_prompt_log_probs(
    vlm: VLM, row: Mapping[str, Tensor], names: NamePairs, token_by_token: bool = False
) -> np.ndarray:  # fmt: skip
    """Summed log-probabilities float32 [names], by one forward pass per name after the cached prompt.

    `row`: as in `full_forward_log_probs`. `token_by_token`: one forward pass per token, as in the reference code.
    Raises ValueError for BLIP-2 and InstructBLIP, whose forward pass requires an image.
    """
    model, length, sums = vlm.model, row["input_ids"].shape[1], []
    if hasattr(model, "qformer"):
        raise ValueError("the forward pass of BLIP-2 and InstructBLIP requires an image")
    prompt_outputs = model(**row, use_cache=True, logits_to_keep=1)
    for input_ids, target_ids in names:
        cache = _prompt_cache(prompt_outputs.past_key_values, length)
        logits = [prompt_outputs.logits[0, -1:]]  # each [tokens, vocabulary]
        input_length = len(input_ids) - 1  # the last token of a name is only a target
        step = 1 if token_by_token else max(1, input_length)
        for start in range(0, input_length, step):
            tokens = input_ids[None, start : min(start + step, input_length)]  # [1, step]
            mask = row["attention_mask"].new_ones((1, length + start + tokens.shape[1]))  # [1, prompt + tokens]
            outputs = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits.append(outputs.logits[0])
        sums.append(_summed_log_prob(torch.cat(logits).float(), target_ids))
    return np.array(sums, dtype=np.float32)


def _summed_log_prob(logits: Tensor, target_ids: Tensor) -> float:
    """The summed log-probability of target_ids [tokens] in the rows of logits [tokens, vocabulary]."""
    rows = torch.arange(len(target_ids), device=target_ids.device)  # [tokens]
    return token_log_probs(logits, rows, target_ids).sum().item()


def _prompt_cache(cache: Any, length: int) -> Any:
    """The KV cache of the prompt alone.

    A cache of plain layers is truncated in place. Other caches (sliding windows, recurrent states) cannot be truncated
    after a name was run, so they are copied.
    """
    layers = getattr(cache, "layers", [])
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return copy.deepcopy(cache)
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return cache


def _append_name(vlm: VLM, row: Mapping[str, Tensor], input_ids: Tensor) -> dict[str, Tensor]:
    """The inputs of one image with the tokens [tokens] of a name after the prompt."""
    inputs = dict(row) | {"input_ids": torch.cat([row["input_ids"], input_ids[None]], dim=1)}
    # PaliGemma attends to its prompt in both directions (type 0), to its answer in one (type 1); elsewhere 0 is text.
    answer_type = int(vlm.model.config.model_type == "paligemma")
    for key, value in (("attention_mask", 1), ("token_type_ids", answer_type), ("mm_token_type_ids", 0)):
        if key in row:
            inputs[key] = torch.cat([row[key], torch.full_like(input_ids, value)[None]], dim=1)
    return inputs
