"""Activation patching: the hidden states of one image, put into the ranking's pass over another image."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmclassifier.ranking.ranker import Ranker
from vlmclassifier.records import UserError
from vlmclassifier.vlm import Batch

POSITIONS = ("last", "text", "image", "all")  # text: the tokens behind the image, without the last
DEEPSTACK = "deepstack_visual_embeds"  # Qwen3-VL adds image features behind its first layers too

Patch = Callable[[Tensor], Tensor]  # hidden states [batch, tokens, width] -> what replaces them


def patched_log_probs(ranker: Ranker, recipients: Batch, donors: Batch, layer: int, positions: str) -> np.ndarray:
    """Log-probabilities float32 [images, names] of recipients whose states at some positions are the donors'.

    `layer`: 0 is what the first layer reads, k the output of the k-th layer. `positions`: one of POSITIONS. The cached
    keys and values of the layers below stay the recipients': the names' own tokens read them. Raises UserError where
    the prompts of a pair are not equally long, and for a model that is not ranked with tree attention masks.
    """
    if ranker.method != "tree":
        raise UserError(f"{ranker.vlm.spec.key} is not ranked with tree attention masks, so it cannot be patched.")
    if not torch.equal(recipients.inputs["input_ids"], donors.inputs["input_ids"]):
        raise UserError("The prompts of recipient and donor differ: patch images with equally many tokens.")
    decoder = ranker.decoder.decoder
    kept: dict[str, Any] = {}

    def keep(states: Tensor) -> Tensor:
        kept["states"] = states
        return states

    with patched(decoder, layer, keep), exchanged_deepstack(decoder, kept, is_donor=True):
        ranker.prefill(donors)
    is_patched = position_mask(ranker, recipients, positions)  # [batch, tokens]

    def replace(states: Tensor) -> Tensor:
        return torch.where(is_patched.to(states.device)[..., None], kept["states"], states)

    reads_image = positions in ("image", "all")  # then the image's later features are the donor's too
    with patched(decoder, layer, replace), exchanged_deepstack(decoder, kept if reads_image else {}, is_donor=False):
        cache = ranker.prefill(recipients)
    return ranker.checked(ranker.path_log_probs(cache))


def position_mask(ranker: Ranker, batch: Batch, positions: str) -> Tensor:
    """Which tokens are patched: bool [batch, tokens]."""
    is_prompt = batch.inputs["attention_mask"].bool()
    is_image = (batch.inputs["input_ids"] == ranker.vlm.model.config.image_token_id) & is_prompt
    is_last = torch.zeros_like(is_prompt)
    is_last[:, -1] = True
    behind_image = is_image.flip(1).cumsum(dim=1).flip(1) == 0  # no image token at or behind it
    return {
        "last": is_last, "image": is_image, "all": is_prompt, "text": behind_image & is_prompt & ~is_last,
    }[positions]  # fmt: skip


@contextmanager
def patched(decoder: Any, layer: int, patch: Patch) -> Iterator[None]:
    """Within it, the states at one layer pass through `patch`."""

    def on_input(module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        if arguments:
            return (patch(arguments[0]), *arguments[1:]), options
        return arguments, options | {"hidden_states": patch(options["hidden_states"])}

    def on_output(module: nn.Module, arguments: tuple, output: Any) -> Any:
        return (patch(output[0]), *output[1:]) if isinstance(output, tuple) else patch(output)

    if layer == 0:
        handle = decoder.layers[0].register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = decoder.layers[layer - 1].register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def exchanged_deepstack(decoder: Any, kept: dict[str, Any], is_donor: bool) -> Iterator[None]:
    """Within it, the image features that a decoder adds behind its first layers are kept, or replaced by kept ones."""

    def on_call(module: nn.Module, arguments: tuple, options: dict) -> tuple[tuple, dict]:
        if is_donor:
            kept[DEEPSTACK] = options.get(DEEPSTACK)
        elif kept.get(DEEPSTACK) is not None:
            options = options | {DEEPSTACK: kept[DEEPSTACK]}
        return arguments, options

    handle = decoder.register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def draw_donors(
    ids: Sequence[str], labels: Sequence[str], tops: Sequence[int], same_class: bool, seed: int
) -> list[int | None]:  # fmt: skip
    """A donor for every image: one of another class, or with `same_class` of its own, with another top name.

    `tops`: what the model ranks first for each image. Depends on (seed, id) and the other images. None where there is
    no such image.
    """
    donors: list[int | None] = []
    for number, example_id in enumerate(ids):
        possible = [
            other for other in range(len(ids))
            if tops[other] != tops[number] and (labels[other] == labels[number]) == same_class and other != number
        ]  # fmt: skip
        donors.append(random.Random(f"{seed}:{example_id}").choice(possible) if possible else None)
    return donors
